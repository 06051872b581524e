"""Real clients, each in an environment of its own, against a server with random weights.

    python3 -m venv /tmp/openai && /tmp/openai/bin/pip install openai
    python3 -m venv /tmp/litellm && /tmp/litellm/bin/pip install 'litellm!=1.82.7,!=1.82.8'
    python3 -m venv /tmp/schemathesis && /tmp/schemathesis/bin/pip install schemathesis
    m1jax init m1-tiny runs/serve/m1-tiny
    python -m experiments.serve_clients.run runs/serve/m1-tiny --openai /tmp/openai --litellm /tmp/litellm \\
        --schemathesis /tmp/schemathesis

schemathesis makes requests of the server's own description, right ones and wrong ones; none may get a 5xx.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import httpx

from experiments.serving import serving

HERE = Path(__file__).parent


def told(*command: str) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=900)
    return json.loads(done.stdout.splitlines()[-1])


def roomy(model: Path, place: Path) -> Path:
    """A copy of a model with positions for a long conversation."""
    copy = shutil.copytree(model, place / model.name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    for name in ("openai", "litellm", "schemathesis"):
        parser.add_argument(f"--{name}", type=Path, help="directory of its environment")
    parser.add_argument("--examples", type=int, default=100, help="of schemathesis for each operation and phase")
    given = parser.parse_args()
    out = HERE / "result.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    with (
        tempfile.TemporaryDirectory() as here,
        serving(roomy(given.model, Path(here)), "--rows", "8", "--max-length", "16384", "--max-new-tokens", "256") as (
            place,
            process,
        ),
    ):
        name = httpx.get(f"{place}/v1/models").json()["data"][0]["id"]
        if given.openai:
            found = told(str(given.openai / "bin/python"), str(HERE / "openai_client.py"), place, str(process.pid))
            rounds = found.pop("rounds")
            per_token = [seconds / written for _, seconds, _, written, _ in rounds]
            thirds = slice(1, len(rounds) // 3), slice(-(len(rounds) // 3), None)
            result["openai"] = found | {
                "rounds": len(rounds),
                "prompt_tokens": [rounds[0][0], rounds[-1][0]],
                "medians": {
                    name: {
                        "seconds": statistics.median(seconds for _, seconds, *_ in rounds[third]),
                        "processor_seconds": statistics.median(spent for _, _, spent, _, _ in rounds[third]),
                        "prefilled_tokens": statistics.median(tokens for *_, tokens in rounds[third]),
                        "milliseconds_per_written_token": 1000 * statistics.median(per_token[third]),
                    }
                    for name, third in zip(("first_third", "last_third"), thirds)
                },
                "prefilled_tokens_most": max(tokens for *_, tokens in rounds[1:]),
                "all": rounds,
            }
        if given.litellm:
            result["litellm"] = told(str(given.litellm / "bin/python"), str(HERE / "litellm_client.py"), place, name)
        if given.schemathesis:
            command = [str(given.schemathesis / "bin/schemathesis"), "run", f"{place}/openapi.json"]
            command += ["--checks", "not_a_server_error", "-n", str(given.examples), "--request-timeout", "60"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900)
            print(done.stdout[-3000:])
            if done.returncode:
                raise RuntimeError(f"schemathesis ended with status {done.returncode}")
            statuses = re.findall(
                r'm1jax_requests_total\{route="([^"]*)",status="(\d+)"\} (\d+)', httpx.get(f"{place}/metrics").text
            )
            result["schemathesis"] = {f"{route} {status}": int(count) for route, status, count in statuses}
        if httpx.get(f"{place}/health").json()["status"] != "ok":
            raise RuntimeError("the server is not well")
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
