"""Read /metrics with the official Prometheus client's parser. Needs: pip install prometheus-client

Starts the server on a free port, moves some messages, and compares what the parser finds with
the server's table of metrics."""
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import micro_queue  # noqa: E402


def main():
    config = json.loads((ROOT / "config.example.json").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config["settings"].update(listen_port=port, path=folder + "/data")
        path = pathlib.Path(folder, "config.json")
        path.write_text(json.dumps(config))
        server = subprocess.Popen([sys.executable, str(ROOT / "micro_queue.py"), "-c", str(path)],
                                  stderr=subprocess.DEVNULL)
        try:
            check(f"http://127.0.0.1:{port}", config["tokens"][-1]["token"])
        finally:
            server.terminate()
            server.wait()


def ask(url, token=None, data=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        return answer.headers, answer.read()


def wait_ready(url):
    for _ in range(200):
        try:
            return ask(url + "/readyz")
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the server did not become ready")


def check(url, token):
    wait_ready(url)
    for _ in range(3):
        ask(url + "/in/fetcher", token, b"x")
    ask(url + "/out/fetcher", token)
    headers, text = ask(url + "/metrics")
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
