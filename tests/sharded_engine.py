"""A small engine that speaks as much of vLLM as the node agent needs, with a real worker process on every GPU.

The emulated engine is one process; this one is for what happens to shards: a worker that dies alone, workers that
outlive their leader or leave its session, memory that is not given back. `serve MODEL --tensor-parallel-size N …`.

SHARDED_TROUBLE names what goes wrong, by tensor parallelism: "2:no-health 4:orphans".
  orphans    workers leave the session and stay when the engine ends
  no-health  /health never answers 200
  dies       the engine ends before it is healthy
  no-warm-up the warm-up request is answered 500
  deaf       SIGTERM is ignored
SHARDED_RUNNING names a file whose number is reported as running requests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from simulator.host.nvml.state import STATE_VARIABLE, HostState

WORKER_BYTES = 60 << 30


def main() -> None:
    if sys.argv[1] == "worker":
        work(sys.argv[2], "orphans" in sys.argv[3])
    arguments = sys.argv[2:]
    tp = int(arguments[arguments.index("--tensor-parallel-size") + 1])
    port = int(arguments[arguments.index("--port") + 1])
    troubles = dict(word.split(":") for word in os.environ.get("SHARDED_TROUBLE", "").split())
    serve(tp, port, troubles.get(str(tp), ""))


def work(gpu: str, stays: bool) -> None:
    if stays:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    host = HostState.open(Path(os.environ[STATE_VARIABLE]))
    host.attach_process(host.uuids.index(gpu), os.getpid(), WORKER_BYTES)
    os.write(1, b"loaded\n")
    time.sleep(3600)


def serve(tp: int, port: int, trouble: str) -> None:
    if trouble == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: stop())
    gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[:tp]
    workers = [
        subprocess.Popen([sys.executable, __file__, "worker", gpu, trouble], stdout=subprocess.PIPE) for gpu in gpus
    ]
    if trouble == "dies":
        time.sleep(0.5)
        sys.exit("the sharded engine was told to die")

    def stop() -> None:
        if trouble != "orphans":
            for worker in workers:
                worker.kill()
                worker.wait()
        os._exit(0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/health":
                self.answer(503 if trouble == "no-health" else 200, b"")
            elif self.path == "/metrics":
                file = os.environ.get("SHARDED_RUNNING", "")
                running = Path(file).read_text().strip() if file and Path(file).exists() else "0"
                lines = f"vllm:num_requests_running {running}\nvllm:num_requests_waiting 0\n"
                self.answer(200, lines.encode())
            else:
                self.answer(404, b"")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.answer(500 if trouble == "no-warm-up" else 200, json.dumps({"choices": []}).encode())

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
