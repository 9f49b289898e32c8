"""A headless Chromium driven over its debugging pipe, with the standard library alone."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


@dataclass
class Visit:
    """What a page did: every address it asked for, and everything it complained about."""

    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def outside(self) -> list[str]:
        return [address for address in self.asked if not address.startswith(("data:", "blob:", "file:", "about:"))]


class Browser:
    """Chromium behind its DevTools protocol: one JSON message per NUL-terminated line on file descriptors 3 and 4."""

    def __init__(self, program: str, profile: Path) -> None:
        # No page may reach anything: every name fails to resolve, yet the attempt is still reported as a request.
        flags = [*FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        # Above 10, so that dup2 onto 3 and 4 in the child cannot hit an end it still needs.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_read, from_write)]

        def wire() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [program, *flags],
            preexec_fn=wire,  # noqa: PLW1509 - the tests start no threads
            close_fds=False,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for end in (to_read, from_write, *ends):
            os.close(end)
        self.send_end, self.receive_end = to_write, from_read
        self.buffer, self.count, self.session = b"", 0, ""
        self.visited = Visit()
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that arrive meanwhile are recorded."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_end, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            answer = self.receive(deadline - time.monotonic())
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return answer["result"]
        raise TimeoutError(method)

    def receive(self, patience: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.receive_end], [], [], max(patience, 0.0))[0]:
                return {}
            chunk = os.read(self.receive_end, 1 << 20)
            assert chunk, "Chromium ended unexpectedly"
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        self.note(message.get("method", ""), message.get("params", {}))
        return message

    def note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.visited.asked.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.visited.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
            self.visited.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.visited.complaints.append(params["entry"]["text"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def visit(self, path: Path, settle: float = 0.3) -> Visit:
        """Open a file, wait for its load event and a little longer, and say what it did."""
        self.visited, self.loaded = Visit(), False
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + 20
        while not self.loaded:
            assert time.monotonic() < deadline, f"{path} never finished loading"
            self.receive(1.0)
        end = time.monotonic() + settle
        while time.monotonic() < end:
            self.receive(end - time.monotonic())
        return self.visited

    def run(self, script: str, wait: bool = False) -> Any:
        """Evaluate a script in the page as a user's console would, outside the page's own policy."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=wait)
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def look(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Set the window size and the preferred colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def close(self) -> None:
        for end in (self.send_end, self.receive_end):
            os.close(end)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
