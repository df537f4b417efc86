"""What a TRL user has to audit: the files that `from rlsd_lib import RLSDTrainer` loads."""

import subprocess
import sys
from pathlib import Path

# No law of nature: where the import stands, rounded up, so that whoever adds to it has to say so
# here. It was 3,200 lines with the paper's methods; the credits after it, with their signals, weights
# and refusals, are the other thousand. A name for the privileged column and the event at which a
# callback sees credit are thirty, checkpoints that list their files and settings, and refusals of
# values, rows and rewards before training, are 550 more.
MOST_FILES, MOST_LINES = 17, 4950


def test_the_users_import_is_small() -> None:
    code = (
        "import sys\nfrom rlsd_lib import RLSDTrainer\n"
        "print(*(m.__file__ for n, m in sorted(sys.modules.items()) if n.startswith('rlsd_lib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = done.stdout.split()
    lines = sum(len(Path(path).read_text().splitlines()) for path in files)
    sys.stdout.write(f"RLSDTrainer loads {len(files)} files, {lines} lines\n")
    assert len(files) <= MOST_FILES, files
    assert lines <= MOST_LINES
