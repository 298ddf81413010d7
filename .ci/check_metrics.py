"""Read /metrics with the official Prometheus client's parser. Needs: pip install prometheus-client

Starts the server on a free port, moves some messages, and compares what the parser finds with
the server's table of metrics."""
import pathlib
import sys
import tempfile
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import micro_queue  # noqa: E402
from test_micro_queue import ServerProcess  # noqa: E402


def main():
    with tempfile.TemporaryDirectory() as folder, ServerProcess(folder) as server:
        check(server.wait_ready())


def check(server):
    for _ in range(3):
        server.ask("POST", "/in/fetcher", b"x")
    server.ask("GET", "/out/fetcher")
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        headers, text = answer.headers, answer.read()
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8", headers
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    for name, kind, _ in micro_queue.METRICS:
        family = families.pop(name[:-len("_total")] if name.endswith("_total") else name)
        assert family.type == kind, (name, family.type)
        assert family.samples, f"{name} has no samples"
    assert not families, f"not in the table: {sorted(families)}"
    print("metrics: the official parser finds what the table says")


if __name__ == "__main__":
    main()
