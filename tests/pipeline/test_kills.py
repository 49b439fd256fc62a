"""A run that is killed at any moment resumes to the same result, and leaves nothing half-written."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from hub import TOKEN, Hub, hub
from runs import causal_lm

from hf_layerfuse import AutoFusedModel, Plan

KILLS = int(os.environ.get("LAYERFUSE_KILLS", "6"))
"""Number of kills; a release is tested with 50."""

RESULT = ("model.safetensors", "config.json", "plan.json", "tokenizer.json")


def start(site: Hub, home: Path, words: list[str], out: str, log: Path) -> subprocess.Popen:
    """Start a run with rounds, healing, pictures, a card, and a published result."""
    own = {"HF_ENDPOINT": site.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "home")}
    command = [sys.executable, str(ROOT / "fuse.py"), *words, "--output_dir", str(home / out), "--overwrite"]
    command += ["--push_to_hub", f"someone/{out}", "--private"]
    environment = {**os.environ, **own, "HF_TOKEN": TOKEN, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file, cwd=ROOT)


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULT}


@pytest.mark.slow
def test_killed_runs_resume(tmp_path: Path) -> None:
    """After each kill, the output directory and the repository are absent, empty or whole. The last start ends with
    the weights of an undisturbed run, to the bit."""
    words = causal_lm(tmp_path)
    words += [
        "--evaluate.latency",
        "false",
        "--heal.schedule",
        "uniform",
        "--heal.steps",
        "6",
        "--heal.eval_every",
        "1",
        "--evaluate.retrain_original",
        "true",
    ]
    words += ["--fusion.keep_layers", "3", "--fusion.mode", "share"]
    log, chance = tmp_path / "log", random.Random(0)
    with hub(tmp_path / "hub") as site:
        begun = time.monotonic()
        assert start(site, tmp_path, words, "whole", log).wait() == 0, log.read_text()
        whole, seconds = read(tmp_path / "whole"), time.monotonic() - begun
        killed = 0
        while killed < KILLS:
            process = start(site, tmp_path, words, "killed", log)
            while process.poll() is None and "reading the data" not in log.read_text():
                time.sleep(0.05)  # imports write nothing
            time.sleep(chance.uniform(0, 0.8 * seconds))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
            process.wait()
            assert process.returncode in (0, -signal.SIGKILL), log.read_text()
            if (tmp_path / "killed").exists():
                AutoFusedModel.from_pretrained(tmp_path / "killed")
                Plan.load(tmp_path / "killed" / "plan.json")
                assert read(tmp_path / "killed") == whole
            repository = site.repositories.get(("models", "someone/killed"))
            for files in repository.commits.values() if repository else ():
                assert not files.keys() & set(RESULT) or all(files[name] == whole[name] for name in RESULT)
        assert start(site, tmp_path, words, "killed", log).wait() == 0, log.read_text()
        assert read(tmp_path / "killed") == whole
        published = site.repositories["models", "someone/killed"].files("main")[1]
        assert all(published[name] == whole[name] for name in RESULT)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not left, "no unfinished work is left"
