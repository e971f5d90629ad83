#!/bin/bash
# EDM2 on ImageNet-512 latents, the S preset: sbatch slurm/edm2_imagenet.sh --data.source LATENTS [--recipe edm2_img512_xl ...]
#SBATCH --job-name=edm2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1             # one launcher a node; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=1-00:00:00               # any limit will do: what is left goes on in the next run
#SBATCH --signal=B:USR1@300             # save and queue again this many seconds before the limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

source slurm/job.sh
train edm2 accelerate_configs/multinode.yaml --recipe edm2_img512_s --out runs/edm2_imagenet "$@"
