"""Headless Chromium over its debugging pipe: JSON messages that end with a zero byte, no library in between."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """The program named by CHROMIUM, else the first of the usual names on the path."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process; `Tab` is a page of it. What the pages ask of the network and say in the console is kept in `events`."""

    def __init__(self, program: str):
        self.profile = tempfile.TemporaryDirectory(prefix="clbench-chromium-", ignore_cleanup_errors=True)
        ours, theirs = os.pipe(), os.pipe()  # the browser reads from 3 and writes to 4
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += [
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={self.profile.name}",
        ]
        inner = "import fcntl, os, sys; a, b = (fcntl.fcntl(int(v), fcntl.F_DUPFD, 64) for v in sys.argv[1:3]); "
        inner += "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[3], sys.argv[3:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", inner, str(ours[0]), str(theirs[1]), program, *flags, "about:blank"],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.write_to, self.read_from, self.rest = ours[1], theirs[0], b""
        self.numbers, self.events = itertools.count(1), []

    def send(self, method: str, session: str | None = None, timeout: float = 30, **params):
        """Call a method and wait for its answer; events that come meanwhile are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_to, data) :]
        stop = time.monotonic() + timeout
        while True:
            got = self.receive(stop - time.monotonic())
            if got is None:
                raise TimeoutError(f"{method} took more than {timeout} s")
            if got.get("id") == number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']['message']}")
                return got["result"]

    def receive(self, timeout: float):
        """The next message, or None after `timeout` seconds; events are kept."""
        stop = time.monotonic() + timeout
        while b"\0" not in self.rest:
            left = stop - time.monotonic()
            if left <= 0 or not select.select([self.read_from], [], [], left)[0]:
                return None
            more = os.read(self.read_from, 1 << 20)
            if not more:
                raise RuntimeError("the browser has gone")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\0")
        got = json.loads(line)
        if "method" in got:
            self.events.append(got)
        return got

    def tab(self, width: int = 1400, height: int = 900, dark: bool = False) -> Tab:
        """A new page that shares no storage with others."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, target, session, width, height, dark)

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)
        self.profile.cleanup()


class Tab:
    """A page with a window of its own size and theme."""

    def __init__(self, browser: Browser, target: str, session: str, width: int, height: int, dark: bool):
        self.browser, self.target, self.session = browser, target, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[theme])

    def send(self, method: str, **params):
        """Call a method of this page."""
        return self.browser.send(method, self.session, **params)

    def open(self, path: pathlib.Path, fragment: str = "", timeout: float = 20) -> float:
        """Open a file and wait until its script is done -> seconds."""
        start = time.monotonic()
        self.send("Page.navigate", url=path.resolve().as_uri() + fragment)
        while not self("document.documentElement && document.documentElement.dataset.ready === 'yes'"):
            if time.monotonic() - start > timeout:
                raise TimeoutError(f"{path} is not ready: {self.troubles()}")
            time.sleep(0.02)
        taken = time.monotonic() - start
        self.frame()
        return taken

    def frame(self) -> None:
        """Wait until what was asked for is drawn."""
        self("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def __call__(self, expression: str):
        """The value of an expression in the page."""
        got = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(got["exceptionDetails"].get("exception", {}).get("description", str(got["exceptionDetails"])))
        return got["result"].get("value")

    def own(self, *methods: str) -> list[dict]:
        """Parameters of this page's events so far."""
        kept = [e for e in self.browser.events if e.get("sessionId") == self.session and e["method"] in methods]
        return [event["params"] for event in kept]

    def troubles(self) -> list[str]:
        """Exceptions, console errors and anything that the browser logged, policies that were broken among it."""
        self("1")
        found = [
            e["exceptionDetails"].get("exception", {}).get("description", "?") for e in self.own("Runtime.exceptionThrown")
        ]
        found += [str(e["args"]) for e in self.own("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")]
        return found + [e["entry"]["text"] for e in self.own("Log.entryAdded")]

    def asked(self) -> list[str]:
        """Addresses that were asked for, except the file itself, `blob:` and `data:`."""
        self("1")
        urls = [e["request"]["url"] for e in self.own("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("file:", "blob:", "data:", "about:"))]

    def picture(self, path: pathlib.Path, whole: bool = True) -> None:
        """A PNG of the page."""
        got = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(got["data"]))

    def key(self, name: str, modifiers: int = 0) -> None:
        """Press and release a key; modifiers: 8 is Shift."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}[name]
        press = {"key": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(name)
        self.send("Input.dispatchKeyEvent", type="keyDown", **press, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **press)

    def close(self) -> None:
        """Close the page."""
        self.browser.send("Target.closeTarget", targetId=self.target)
