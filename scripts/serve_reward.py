"""Serve one reward to other processes on this machine, over the protocol of diffalign/rewards/remote.py:
    python scripts/serve_reward.py compressibility --port 8000 quality=90
and elsewhere: kind remote, url http://127.0.0.1:8000/. Loopback only, no key: tunnel the port to another machine (ssh -L).
"""

import argparse
import base64
import io
import json
import math
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image

from diffalign.config import apply_override, load_reward
from diffalign.errors import UserError
from diffalign.rewards import judged

LARGEST = 256_000_000  # bytes of a request


def answer(reward, question: dict) -> dict:
    pictures = question["pictures"]
    images = [Image.open(io.BytesIO(base64.b64decode(p["png"], validate=True)), formats=("PNG",)) for p in pictures]
    scores = judged(reward, images, [p["prompt"] for p in pictures]).tolist()
    return {"scores": [{"id": p["id"], "score": None if math.isnan(s) else s} for p, s in zip(pictures, scores)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward")
    parser.add_argument("options", nargs="*", help="name=value")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_intermixed_args()
    spec = {"kind": args.reward}
    try:
        for option in args.options:
            apply_override(spec, option)
        reward = load_reward(spec)
    except UserError as error:
        parser.error(str(error))  # exits with 2

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                if not 0 < (length := int(self.headers.get("Content-Length", 0))) <= LARGEST:
                    raise ValueError(f"a request has 1 to {LARGEST} bytes")
                status, reply = 200, answer(reward, json.loads(self.rfile.read(length)))
            except (ValueError, LookupError, TypeError, OSError, UserError) as error:
                status, reply = 400, {"error": str(error)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

    HTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
