"""The pages in a real headless Chromium: without network, on a phone's width, with mouse and keyboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from diffalign.evaluate import EvaluateSpec, Run, write_report
from diffalign.evaluate.compare import compare
from diffalign.evaluate.report import write_grids
from diffalign.rewards.rules import Colourfulness
from diffalign.rewards.scenes import SceneChecker, parse

from .scenes import prompts, side
from .test_models import HACKED

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")

# The page runs in a frame of a phone's width; the steps act as a user would and note what they see, by name.
PROBE = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe src="%(page)s" style="width:%(width)dpx;height:900px;border:0"></iframe>
<script>
const frame = document.querySelector("iframe"), seen = {};
frame.onload = async () => {
  const d = frame.contentDocument, w = frame.contentWindow, root = d.documentElement;
  const mouse = (type, element) => element.dispatchEvent(new w.PointerEvent(type, { pointerType: "mouse", bubbles: false }));
  const press = (key) => d.querySelector("dialog").dispatchEvent(new w.KeyboardEvent("keydown", { key, bubbles: true }));
  const label = () => d.querySelector("dialog b").textContent;
  try {
    seen.width = root.clientWidth;
    seen.sideways = root.scrollWidth - root.clientWidth;
    seen.loaded = [...d.images].filter((i) => i.closest(".tile")).every((i) => i.complete && i.naturalWidth > 0);
    seen.fetched = w.performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).map((e) => e.name);
    const inserted = d.createElement("script");
    inserted.textContent = "window.owned = true";
    d.body.append(inserted);
    seen.owned = w.owned === true;
    const card = [...d.querySelectorAll(".pair")].find((c) => c.querySelector('[data-label^="a model"]'));  // of all models
    const tiles = [...card.querySelectorAll(".tile")];
    const own = tiles.map((tile) => tile.querySelector("img").src);
    mouse("pointerenter", tiles[1]);
    seen.hover = tiles[1].querySelector("img").src === own[0] && tiles[1].querySelector(".tag").textContent;
    mouse("pointerleave", tiles[1]);
    seen.back = tiles[1].querySelector("img").src === own[1] && tiles[1].querySelector(".tag").textContent;
    tiles[0].dispatchEvent(new w.PointerEvent("pointerenter", { pointerType: "touch" }));
    seen.touch = tiles[0].querySelector("img").src === own[0];
    tiles[1].click();
    const large = d.querySelector("dialog img");
    seen.zoom = d.querySelector("dialog").open && large.src === own[1] && large.getBoundingClientRect().width;
    seen.zoomed = label();
    seen.fits = d.querySelector("dialog").getBoundingClientRect().right <= root.clientWidth;
    large.click();
    seen.swapped = label();
    press("s");
    press("ArrowRight");
    seen.right = label();
    press("ArrowRight");
    seen.around = label();
    const before = d.querySelector("dialog em").textContent;
    press("ArrowDown");
    seen.down = d.querySelector("dialog em").textContent !== before;
    press("ArrowUp");
    seen.up = d.querySelector("dialog em").textContent === before;
    d.querySelector("[data-close]").click();
    seen.closed = !d.querySelector("dialog").open;
  } catch (error) { seen.error = String(error); }
  document.title = JSON.stringify(seen);
};
</script></body>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    texts = [*prompts(24), "an " + "unbroken" * 60, "<script>alert(1)</script> a very long prompt " * 12]
    models = {"base": side(0.6, 1), "aligned": side(0.2, 2), "a model with quite a long name-that-has-no-break": side(0.5, 3),
              "strength 0.5": side(0.4, 4)}
    spec = EvaluateSpec(prompts="x", judge=SceneChecker(), rewards={"vivid": Colourfulness()}, bootstrap_resamples=200,
                        grid_prompts=26)
    kinds = [scene.kind if (scene := parse(text)) else "none" for text in texts]
    found = compare(models, texts, spec, categories=kinds, progress=None,
                    strengths={"base": 0.0, "strength 0.5": 0.5, "aligned": 1.0})
    found.alarms["aligned"] = HACKED
    run = Run(title="Diffusion-DPO, LoRA, on tiny", base_model="b", method="Diffusion-DPO", rank=4, beta=2000.0, steps=10,
              command="diffalign train " + "a" * 90, config={"a": "b" * 200})
    write_report(folder, run, found)
    write_grids(folder, run.title, found, page=True)
    return folder


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("page", ["report.html", "grid.html"])
def test_page_without_network(pages, tmp_path, page, width):
    probe = pages / f"probe-{width}-{page}"
    probe.write_text(PROBE % {"page": page, "width": width})
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security", "--hide-scrollbars",
               "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000", "--virtual-time-budget=5000",
               "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    seen = json.loads(unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
    assert "error" not in seen, seen
    assert seen["width"] == width and seen["sideways"] == 0
    assert seen["loaded"] and seen["fetched"] == [] and not seen["owned"]
    assert seen["hover"] == "base" and seen["back"] == "aligned" and seen["touch"]
    assert seen["zoom"] > (300 if width == 390 else 500) and seen["zoomed"] == "aligned" and seen["fits"]
    assert seen["swapped"] == "base" and seen["right"] == "a model with quite a long name-that-has-no-break"
    assert seen["around"] == "base" and seen["down"] and seen["up"] and seen["closed"]
