"""A headless Chromium that tests drive over two pipes, in the DevTools protocol: JSON, with a zero after each."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,800"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
]


class Browser:
    """One page of one Chromium.

    Args:
        folder: empty; for what the browser keeps.
    """

    def __init__(self, folder: Path):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        # It reads commands from 3, and writes answers to 4.
        start = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", CHROMIUM]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        flags = [*FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen([*start, *flags], pass_fds=(commands, answers), **quiet)
        os.close(commands)
        os.close(answers)
        self.reader, self.number, self.session, self.events = os.fdopen(self.answers, "rb"), 0, None, []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        self.reader.close()

    def message(self) -> dict:
        """The next message of the browser."""
        letters = bytearray()
        while (letter := self.reader.read(1)) != b"\0":
            assert letter, "the browser has ended"
            letters += letter
        return json.loads(letters)

    def call(self, method: str, **parameters: object) -> dict:
        """Calls a method of the protocol, and returns its result. Keeps the events until then."""
        self.number += 1
        call = {"id": self.number, "method": method, "params": parameters}
        call |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(call).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, script: str) -> object:
        """The value of a JavaScript expression in the page; of a promise, what it comes to."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, address: str) -> None:
        """Opens an address, and waits until the page has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def screenshot(self, path: Path) -> None:
        """Writes what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def asked_for(self) -> list[str]:
        """The addresses that were asked for since the page was opened."""
        asked = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in asked]
