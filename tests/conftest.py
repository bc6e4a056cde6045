"""What all tests share: the modules beside this folder can be imported, and the sample is there."""
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402  (found by the line above)
import train  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def sample():
    """Drawn once, as a user's first command does, and kept for the next time."""
    train.data_folder(str(evaluate.SAMPLE))


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's, removed after its test: the checkpoints of all tests would take 17 GB."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
