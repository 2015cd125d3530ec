"""What a user's type checker knows of the package."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAST = 0.95


@pytest.mark.slow
def test_public_names_have_types(tmp_path):
    # pyright looks for the package, and for torch, on this path alone.
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    options = ["--verifytypes", "multimax", "--ignoreexternal", "--pythonpath", sys.executable]
    done = subprocess.run(
        [sys.executable, "-m", "pyright", *options, "--outputjson"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)["typeCompleteness"]
    known = {symbol["name"]: symbol["isTypeKnown"] for symbol in report["symbols"]}
    assert known["multimax.functional.check_mask"]  # torch was found
    unknown = [name for name, is_known in known.items() if not is_known]
    assert report["completenessScore"] >= LEAST, unknown
