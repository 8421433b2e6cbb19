"""The built site, served on loopback, and a real Chromium that looks at it."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder of the built site."""
    folder = os.environ.get("KEYMGMT_TEST_SITE")
    if folder is None:
        pytest.skip("no site was built: tox -e docs")
    return Path(folder)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Print nothing of requests."""


@pytest.fixture(scope="session")
def address(built) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=built)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@dataclass
class Browser:
    """Chromium without a window, driven by WebDriver."""

    driver: Any
    address: str

    def open(self, page: str) -> None:
        self.driver.get(self.address + page)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def be(self, width: int, height: int, scheme: str = "light") -> None:
        """Be a screen of so many pixels, of a person who prefers ``light`` or ``dark``."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def complaints(self) -> list[str]:
        """Since the last call: warnings and errors of the console, and requests to another host."""
        told = self.driver.get_log("browser")
        lines = [each["message"] for each in told if each["level"] in ("WARNING", "SEVERE")]
        events = [
            json.loads(each["message"])["message"] for each in self.driver.get_log("performance")
        ]
        asked = [
            each["params"]["request"]["url"]
            for each in events
            if each["method"] == "Network.requestWillBeSent"
        ]
        return lines + [url for url in asked if not url.startswith((self.address, "data:"))]


@pytest.fixture(scope="session")
def browser(address, require_tool) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(require_tool("chromium", "google-chrome", package="chromium"))
    # Root has no sandbox of Chromium's; it reads pages of ours alone.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = require_tool("chromedriver", package="chromium-driver")
    service = webdriver.ChromeService(executable_path=str(driver))
    started = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(started, address)
    finally:
        started.quit()
