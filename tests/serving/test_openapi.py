"""Calls that the OpenAPI document allows, and many that it does not: none is the server's fault."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = 400  # of each of seven operations: about five minutes; raise it to 1,430 for 10,000 in all


@pytest.mark.slow
def test_no_call_made_from_the_document_is_the_servers_fault(client, caplog):
    pytest.importorskip("schemathesis")
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{client.base_url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "fuzzing", "--mode", "all", "--seed", "0"]
    command += ["--max-examples", str(CASES), "--no-color", "--request-timeout", "20", "--suppress-health-check", "all"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1_500)
    errors = [record.fields for record in caplog.records if record.levelname == "ERROR"]
    assert errors == []
    assert run.returncode == 0, run.stdout[run.stdout.find("FAILURES") :][:3_000]
    assert client.get("/readyz").status_code == 200
