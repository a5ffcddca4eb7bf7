"""Every fenced block of `bash` and `python` in README.md and docs/, run as a reader would run it.

A page is one shell and one Python in a folder that holds the reader's log. README.md runs first; every other page
starts from a copy of the folder as README.md left it. The Hub is one on loopback, and so is what listens on port 8000.
A block that begins with `# not run by the tests: REASON` is skipped, for the reader to see; other languages are output.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_world import tiny_items, tiny_log

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
NOT_RUN = "# not run by the tests: "
BLOCK_SECONDS = 150

# Training stops after one epoch. What holds a reader's terminal (`pinrec serve`, `demo`) goes on in the background, on
# a port of its own. Everything else starts warm (tests/docs/warm.py).
SHELL = """
accelerate() { $WARM accelerate "$@" --num_train_epochs 1; }
curl() { command curl --silent --show-error --fail-with-body "${@//localhost:8000/localhost:$PORT}"; }
pkill() { kill "$1" "$server"; }
pinrec() {
    case "$1" in serve|demo) [ -z "${server-}" ] || { kill "$server"; wait "$server" || true; } ;; esac
    case "$1" in
        serve) command pinrec "$@" --port "$PORT" --drain 0 & ;;
        demo) command pinrec "$@" --port "$PORT" & ;;
        *) $WARM pinrec "$@"; return ;;
    esac
    server=$!
    until command curl --silent --output /dev/null "localhost:$PORT"; do kill -0 "$server"; sleep .2; done
}
trap '[ -z "${server-}" ] || { kill "$server" && wait "$server"; } || true' EXIT
while read -r block; do
    . "$block" < /dev/null
    touch "$block.done"
done
"""


def snippets(text: str) -> list[tuple[str, str]]:
    """Language and code of the blocks that run, in order."""
    return [
        (language, code)
        for _, language, code in FENCE.findall(text)
        if language in ("bash", "python") and not code.lstrip().startswith(NOT_RUN)
    ]


class Reader:
    """A shell and a Python that read one page in `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.processes: dict[str, subprocess.Popen] = {}
        self.log = folder / "page.log"

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for process in self.processes.values():
            process.stdin.close()
            if error is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)

    def run(self, number: int, language: str, code: str) -> None:
        """Runs a block, and fails with its code and the end of the page's output."""
        if language not in self.processes:
            shell, python = ["bash", "-euo", "pipefail", "-c", SHELL], [*self.environment["WARM"].split(), "python"]
            with self.log.open("a") as log:
                self.processes[language] = subprocess.Popen(
                    shell if language == "bash" else python,
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        process, block = self.processes[language], self.folder / f"block-{number}"
        block.write_text(code)
        done, start = Path(f"{block}.done"), time.monotonic()
        process.stdin.write(f"{block}\n")
        process.stdin.flush()
        while not done.exists():
            if process.poll() is not None or time.monotonic() - start > BLOCK_SECONDS:
                pytest.fail(f"this block failed:\n{code}\n{self.log.read_text()[-4000:]}", pytrace=False)
            time.sleep(0.05)


def read(page: str, folder: Path, environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with Reader(folder, {**environment, "PORT": port}) as reader:
        for number, (language, code) in enumerate(snippets((ROOT / page).read_text())):
            reader.run(number, language, code)


@pytest.fixture(scope="module")
def environment(loopback, tmp_path_factory):
    """What a reader's processes run with; the one that they are forked of runs meanwhile."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    address, script = tmp_path_factory.mktemp("warm") / "socket", ROOT / "tests" / "docs" / "warm.py"
    warm = f"{sys.executable} -SE {script} {address}"
    environment = {**loopback.environment(home="reader"), "PATH": path, "WARM": warm, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), "serve", str(address)]
    with subprocess.Popen(words, env=environment, start_new_session=True) as process:
        while not address.exists() and process.poll() is None:
            time.sleep(0.05)
        yield environment
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory, environment) -> Path:
    """A clone with a reader's log in it, in which README.md was followed."""
    folder = tmp_path_factory.mktemp("reader") / "README"
    (folder / "logs").mkdir(parents=True)
    (folder / "training").symlink_to(ROOT / "training")
    rows, items = tiny_log(), tiny_items()
    ids = {item: f"i{item[1:]}" for item in items["item_id"].to_pylist() if re.fullmatch(r"p\d+", item)}
    for row in rows:
        for column in ("item_id", "context_item_id"):
            row[column] = ids.get(row[column], row[column])
        row["timestamp"] = None if row["timestamp"] is None else row["timestamp"] * 1000
    log = pa.Table.from_pylist(rows)
    log = log.set_column(
        log.schema.get_field_index("timestamp"), "timestamp", log["timestamp"].cast(pa.timestamp("ms"))
    )
    pq.write_table(log, folder / "logs" / "2023.parquet")
    renamed = pa.array([ids.get(item, item) for item in items["item_id"].to_pylist()])
    pq.write_table(items.set_column(0, "item_id", renamed), folder / "items.parquet")
    read("README.md", folder, environment)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_of(page, after_readme, environment):
    if page == "README.md" or not snippets((ROOT / page).read_text()):
        return  # the fixture has run it; or nothing to run
    folder = shutil.copytree(after_readme, after_readme.parent / Path(page).stem, symlinks=True)
    for name in [*folder.glob("block-*"), folder / "page.log"]:
        name.unlink()
    read(page, folder, environment)


def test_a_snippet_that_fails_is_noticed(tmp_path, environment):
    text = "```bash\nfalse\n```\n\n```python\nthis is wrong\n```\n\n```bash\n# not run by the tests: no\nfalse\n```\n"
    assert [language for language, _ in snippets(text)] == ["bash", "python"]
    for number, (language, code) in enumerate(snippets(text)):
        with Reader(tmp_path, environment) as reader, pytest.raises(pytest.fail.Exception, match="block failed"):
            reader.run(number, language, code)
