"""Commands without the seconds that their imports take: a process that has imported all forks one for each.

`python warm.py serve SOCKET` is that process. `python warm.py SOCKET pinrec ...`, `accelerate launch SCRIPT ...` or
`python` (which executes the files named on its input, in one namespace) run in a fork of it, in the caller's folder,
with its input and output, and end with the fork's exit status.
"""

import contextlib
import json
import os
import socket
import sys
import traceback


def serve(path: str) -> None:
    import runpy

    import datasets  # noqa: F401
    import faiss  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import pinrec_hf.cli
    import pinrec_hf.evaluation.prequential
    import pinrec_hf.training.finetune
    import pinrec_hf.training.pretrain
    from pinrec_hf import PinRecRetriever  # noqa: F401

    def train(words: list[str]) -> int:
        child = os.fork()
        if child == 0:
            sys.argv = ["pretrain.py", *words]
            with contextlib.redirect_stdout(sys.stderr):
                pinrec_hf.training.pretrain.main()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    pinrec_hf.evaluation.prequential._launch = train  # of `pinrec prequential`, which trains in processes of its own

    def execute(program: str, words: list[str]) -> int | None:
        if program == "pinrec":
            return pinrec_hf.cli.main(words)
        if program == "accelerate":  # one process on a CPU: what `accelerate launch` comes to
            sys.argv = words[1:]
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
            return 0
        names = {"__name__": "__main__"}
        for line in sys.stdin:
            with open(line.strip()) as block:
                exec(compile(block.read(), block.name, "exec"), names)
            open(f"{block.name}.done", "w").close()
        return 0

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
            folder, program, *words = json.loads(message)
            os.chdir(folder)
            status: int | str | None = 1
            try:
                status = execute(program, words)
            except SystemExit as end:
                status = end.code
                if isinstance(status, str):
                    print(status, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send(bytes([status if isinstance(status, int) else int(status is not None)]))
            os._exit(0)
        connection.close()


def ask(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps([os.getcwd(), *words]).encode()], [0, 1, 2])
        return (connection.recv(1) or b"\x01")[0]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
