"""Every command of the README and the guide is run as it stands there: a page's in one folder, in order, beside its files."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import DATA, ROOT

from clbench.guide import topics

PAGES = {"README": ROOT / "README.md", **topics.topics()}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
BLOCKS = {
    name: [
        (m[1].strip().splitlines(), (m[2] or "").split())
        for m in re.finditer(r"```bash\n(.*?)```\n(?:<!-- (.*?) -->)?", text, re.S)
    ]
    for name, text in TEXTS.items()
}
SHOWN = [name for name, blocks in BLOCKS.items() if any(not needs for _, needs in blocks)]


def shell(line, folder, env):
    line = re.sub(r"(^|&& )clbench ", rf"\1{shlex.quote(sys.executable)} -m clbench ", line)
    line = re.sub(r"(^|&& )python ", rf"\1{shlex.quote(sys.executable)} ", line)
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_readme_opens_with_the_two_commands():
    blocks, text = BLOCKS["README"], TEXTS["README"]
    assert blocks[0][1] == blocks[1][1] == ["install"]
    assert (
        text.index("```bash") < 300
        and blocks[0][0][0].endswith("clbench run results_dir=out")
        and blocks[1][0][0].endswith("pytest")
    )


@pytest.mark.parametrize("page", SHOWN)
def test_commands_run(clbench, page):
    """Plain commands are forked from a process that has the imports done; lines with shell syntax go to a shell."""
    folder = clbench.folder
    example(folder)
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```\n", TEXTS[page], re.S):
        (folder / name).write_text(text)
    for lines, needs in BLOCKS[page]:
        for line in () if needs else lines:
            if line.startswith("clbench ") and not re.search(r"&&|[|;>$#]", line):
                done = clbench(*shlex.split(line)[1:], code=None, timeout=900)
            else:
                done = shell(line, folder, environment())
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_pages_with_commands_are_those_of_the_guide():
    """A page without a command is one of these: text that says what to think of, and what a program made."""
    assert set(PAGES) - set(SHOWN) == {"coverage", "pitfalls"}
    linked = set(re.findall(r"\(clbench/guide/(\w+)\.md\)", TEXTS["README"]))
    assert linked == set(topics.topics()), "README's table of the guide"
    known = "|".join(topics.topics())
    for name, text in TEXTS.items():
        for topic in re.findall(r"`clbench help ([a-z_]+)`", text):
            assert re.fullmatch(known, topic), f"{name} speaks of the topic {topic}"


@pytest.mark.data("cifar100.npz", "pacs.npz", "vit_tiny_patch16_224.safetensors")
def test_commands_on_real_data_run(tmp_path):
    ran = 0
    for lines, needs in [one for blocks in BLOCKS.values() for one in blocks]:
        for line in lines if needs[:1] == ["data"] else ():
            done = shell(line, tmp_path, {**environment(), "CLBENCH_DATA": DATA})
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran == 2


def test_install_command_runs(tmp_path):
    """The first command of the README on a clean copy; it needs a package registry."""
    if not os.environ.get("CLBENCH_TEST_INSTALL"):
        pytest.skip("needs the network and minutes: set CLBENCH_TEST_INSTALL=1")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CLBENCH_DATA")}
    done = subprocess.run(
        ["bash", "-c", BLOCKS["README"][0][0][0]], cwd=tmp_path / "clone", env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "last_macro" in done.stdout


def example(folder: pathlib.Path):
    """What the section on own data needs: four coloured classes, as `example.npz` and as the folder `example`."""
    code = (
        "import numpy as np, pathlib\nfrom PIL import Image\n"
        "rng = np.random.default_rng(0)\narrays = {}\n"
        "for split, count in (('train', 12), ('test', 5)):\n"
        "    y = np.repeat(np.arange(4), count)\n"
        "    tint = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [180, 180, 30]])[y]\n"
        "    x = np.clip(rng.normal(tint[:, None, None], 40, (len(y), 32, 32, 3)), 0, 255).astype(np.uint8)\n"
        "    arrays |= {f'{split}_x': x, f'{split}_y': y}\n"
        "    for i, (image, c) in enumerate(zip(x, y)):\n"
        "        path = pathlib.Path(f'example/{split}/class{c}/{i}.png')\n"
        "        path.parent.mkdir(parents=True, exist_ok=True)\n"
        "        Image.fromarray(image).save(path)\n"
        "np.savez('example.npz', **arrays)\n"
        "import json\n"
        "texts = {w: [' '.join(f'{w}{(7 * d + 3 * k) % 50}' for k in range(300)) for d in range(20)] for w in ('the', 'le')}\n"
        "pathlib.Path('english.txt').write_text(''.join(f'<|doc|>{d}\\n{t}\\n' for d, t in enumerate(texts['the'])))\n"
        "pathlib.Path('french.jsonl').write_text(''.join(json.dumps({'body': t}) + '\\n' for t in texts['le']))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
