"""The commands `accelerate launch trainers/METHOD.py ...`: from their words to a run, and from what went wrong to an exit code."""

import os
import socket
import sys
import warnings

from models import hub
from trainers.config import ConfigError, check_same_run, load_config
from trainers.data import load_images
from trainers.engine import Cluster
from trainers.launch import LaunchError, Plan
from trainers.trainer import Trainer, TrainingError


def main(trainer: type[Trainer], argv: list[str] | None = None) -> None:
    """Train, and leave: with 0 when done, 1 if training failed, 2 for bad input, 130 if a signal stopped it and `loop.stopped` names no file.

    With --check nothing is trained: what this machine lacks of data or teacher is said.
    """
    argv = sys.argv[1:] if argv is None else argv
    talks = int(os.environ.get("RANK", 0)) == 0
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    code, cluster = 0, None
    try:
        config = load_config(trainer.config_class, [word for word in argv if word != "--check"], trainer.default_recipe, trainer.method)
        config.check(int(os.environ.get("WORLD_SIZE", 1)))
        plan = Plan.read(config.config)
        if "--check" in argv:
            _check(config)
        else:
            images = load_images(config.data, progress=talks)
            config = trainer.prepare(config)
            check_same_run(config)
            cluster = Cluster(trainer.networks, plan, config.out, config.loop.tracker)
            trainer(config, cluster, images).fit()
    except (ConfigError, LaunchError, hub.ModelError) as error:
        code = _say(talks, f"error: {error}", 2)
    except TrainingError as error:
        code = _say(talks, f"error: {error}", 1)
    except KeyboardInterrupt:
        code = _say(talks, "stopped; run the same command again to go on", 0 if config.loop.stopped else 130)  # a scheduler looks for its file
    if cluster is not None and code != 2:  # bad input, such as an image, may be one rank's alone: it must not wait for the others
        cluster.close()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # all is written; at the interpreter's own exit, threads of DeepSpeed's CPU collectives now and then abort the process


def _check(config) -> None:
    """What only this machine can say: whether the data and the teacher are here."""
    load_images(config.data, progress=False, ahead=False)
    if config.teacher:
        hub.description(config.teacher)
    print(f"{socket.gethostname()}: ready")


def _say(talks: bool, text: str, code: int) -> int:
    if talks:
        print(text, file=sys.stderr, flush=True)
    return code
