#!/bin/bash
# Progressive distillation on CIFAR-10, 8192 steps to one: sbatch slurm/progressive_cifar10.sh [--teacher RUN_OR_ID ...]
#SBATCH --job-name=progressive
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1             # one launcher a node; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=1-00:00:00               # any limit will do: what is left goes on in the next run
#SBATCH --signal=B:USR1@300             # save and queue again this many seconds before the limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

source slurm/job.sh
train progressive accelerate_configs/multinode.yaml --recipe cifar10_progressive --out runs/progressive_cifar10 "$@"
