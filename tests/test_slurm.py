"""The job scripts on a real Slurm: two nodes on loopback, started and stopped here. Skipped where Slurm is not installed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import HOUSE

SCRIPTS = sorted(p for p in (HOUSE / "slurm").glob("*.sh") if p.name != "job.sh")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
missing = [name for name in DAEMONS if shutil.which(name) is None]
real_slurm = pytest.mark.skipif(bool(missing) or os.getuid() != 0 or torch.cuda.is_available(),
                                reason=f"no Slurm to start here: {', '.join(missing) or 'not root, or there is a GPU'}")
NODES = ("127.0.0.1", "127.0.0.2")  # by their addresses, which need no entry in /etc/hosts
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={at}/munge/socket,cred_expire=5
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd-%n.log
SlurmctldParameters=enable_configless
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,sched_min_interval=0,defer=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName=main Nodes=127.0.0.[1-2] Default=YES State=UP
"""
NODE = ("NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 "
        "RealMemory=1000000 Gres=gpu:8 State=UNKNOWN")


def free_ports() -> int:
    """A port that is free, as are the two after it."""
    for port in range(16900, 17900, 3):
        try:
            for i in range(3):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port + i))
            return port
        except OSError:
            continue
    raise OSError("no free ports")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Two nodes with eight make-believe GPUs each, under a folder of their own."""
    at, host, port = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0], free_ports()
    for folder in ("munge", "state", "gpu", *(f"spool-{node}" for node in NODES)):
        (at / folder).mkdir()
    at.chmod(0o755)
    (at / "key").write_bytes(os.urandom(128))
    (at / "key").chmod(0o400)
    for i in range(8):
        (at / "gpu" / f"gpu{i}").symlink_to("/dev/null")  # slurmd wants a device
    nodes = "\n".join(NODE.format(node=node, host=host, port=port + 1 + i) for i, node in enumerate(NODES))
    (at / "slurm.conf").write_text(CONF.format(at=at, host=host, port=port, nodes=nodes))
    (at / "gres.conf").write_text("".join(f"NodeName={node} Name=gpu File={at}/gpu/gpu[0-7]\n" for node in NODES))
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "SLURM_CONF": str(at / "slurm.conf"), "PATH": scripts + os.pathsep + os.environ["PATH"], "ACCELERATE_USE_CPU": "true",
                   "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    try:
        for command in ([f"munged --force --key-file={at}/key --socket={at}/munge/socket --pid-file={at}/munged.pid --log-file={at}/munged.log "
                         f"--seed-file={at}/seed", "slurmctld -c", *(f"slurmd -c -N {node}" for node in NODES)]):
            subprocess.run(command.split(), env=environment, check=True, capture_output=True, timeout=30)
        wait_for(lambda: len(ask(environment, "sinfo -h -N -t idle -o %N").split()) == 2, 30)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, timeout=30, check=False)
        wait_for(lambda: not ask(environment, "squeue -h"), 20, must=False)
        for file in [*at.glob("slurmd-*.pid"), at / "slurmctld.pid", at / "munged.pid"]:
            if file.is_file():
                stop(int(file.read_text()))


def stop(pid: int) -> None:
    """Ask a daemon to end, and see to it."""
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 15, must=False)
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGKILL)


def ask(environment, command: str) -> str:
    return subprocess.run(command.split(), env=environment, capture_output=True, text=True, check=True, cwd=HOUSE, timeout=60).stdout.strip()


def wait_for(condition, seconds: float, must: bool = True) -> None:
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            assert not must, "waited in vain"
            return
        time.sleep(0.3)


def submit(environment, script: str, log: Path, *arguments, nodes: int = 2) -> str:
    flags = f"--parsable --nodes={nodes} --gpus-per-node=0 --cpus-per-task=1 --output={log}"
    return ask(environment, f"sbatch {flags} slurm/{script} {' '.join(map(str, arguments))}")


def ended(environment, job: str, log: Path, seconds: float = 240) -> dict:
    """The job's last state, once it has one."""
    def state():
        return dict(re.findall(r"(\w+)=(\S+)", ask(environment, f"scontrol -o show job {job}")))

    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: state()["JobState"] in over, seconds)
    return {**state(), "log": log.read_text()}


TRAIN = ("--recipe", "digits_edm2", "--images", "6400", "--loop.log_every", "640", "--loop.tracker", "none")


@real_slurm
def test_two_nodes_train_and_a_requeued_job_ends_in_the_same_bytes(slurm, tmp_path):
    """Two nodes make one run of world size two. One that is told to stop saves, is queued again, goes on, and writes the same model."""
    whole = submit(slurm, "edm2_imagenet.sh", tmp_path / "whole.log", *TRAIN, "--out", tmp_path / "whole")
    done = ended(slurm, whole, tmp_path / "whole.log")
    assert done["JobState"] == "COMPLETED" and "2 processes, 1 a node" in done["log"], done["log"]
    manifest = json.loads((max((tmp_path / "whole/checkpoints").glob("0*")) / "manifest.json").read_text())
    assert manifest["world"] == 2 and len(manifest["files"]) == 2

    job = submit(slurm, "edm2_imagenet.sh", tmp_path / "parts.log", *TRAIN, "--out", tmp_path / "parts")
    wait_for(lambda: (tmp_path / "parts/metrics.jsonl").is_file(), 120)
    ask(slurm, f"scancel --batch --signal=USR1 {job}")
    done = ended(slurm, job, tmp_path / "parts.log")
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), done["log"]
    assert "queued again" in done["log"] and f"resuming {tmp_path / 'parts'} at " in done["log"] and "Traceback" not in done["log"]
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (tmp_path / "parts/model/model.safetensors").read_bytes()


@real_slurm
def test_a_node_without_the_data_is_named(slurm, tmp_path):
    """Before anything is trained, the job fails with the node's name and the sentence that says what it lacks."""
    job = submit(slurm, "progressive_cifar10.sh", tmp_path / "log", "--data.source", "./nowhere", "--out", tmp_path / "run", nodes=1)
    done = ended(slurm, job, tmp_path / "log")
    assert done["JobState"] == "FAILED" and "node 127.0.0.1: error: data.source is ./nowhere, and there is no such file" in done["log"]


@real_slurm
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_accepted_as_they_are(slurm, script):
    """Slurm takes each script with its own settings, GPUs and signals included."""
    done = subprocess.run(["sbatch", "--test-only", "--nodes=2", f"slurm/{script.name}"], env=slurm, cwd=HOUSE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, HOUSE / "slurm/job.sh"], ids=lambda p: p.name)
def test_scripts_are_bash(script):
    """Each parses."""
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
