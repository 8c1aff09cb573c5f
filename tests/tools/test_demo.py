"""Browser tests for the demo page: uploads, examples, clicks, errors and a narrow screen."""

import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_a_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Debian: chromium and chromium-driver")


@pytest.fixture(scope="module")
def console(tmp_path_factory):
    """File with what the server prints to the standard error."""
    return tmp_path_factory.mktemp("server") / "stderr"


@pytest.fixture(scope="module")
def url(console):
    command = [sys.executable, "-m", "crossformer_vision", "demo", "--device", "cpu"]
    with console.open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/")
    yield re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 1400)
    yield driver
    driver.quit()


def shown(browser, element):
    """The address of a picture on the page, or None."""
    found = browser.find_elements(By.CSS_SELECTOR, f"#{element} img")
    return found[0].get_attribute("src") if found else None


def wait(browser, condition):
    return WebDriverWait(browser, 90, ignored_exceptions=()).until(lambda _: condition())


def upload(browser, path):
    clear = browser.find_elements(
        By.CSS_SELECTOR, "#photo button[aria-label='Clear'], #photo button[title='Clear']"
    )
    if clear:
        clear[0].click()
    field = wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#photo input[type=file]"))
    field[0].send_keys(str(path))


@needs_a_browser
def test_upload_click_and_errors(url, console, browser, tmp_path):
    if folder := os.environ.get("CROSSFORMER_SCREENSHOTS"):
        from pathlib import Path

        folder = Path(folder)
    browser.get(url)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#photo input[type=file]"))
    assert browser.title == "CrossFormer"

    # Click an example.
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".gallery-item img, .gallery img"))
    browser.find_elements(By.CSS_SELECTOR, ".gallery-item img, .gallery img")[1].click()
    first = wait(browser, lambda: shown(browser, "result"))
    words = browser.find_element(By.CSS_SELECTOR, "#words textarea, #words input")
    wait(browser, lambda: "%" in words.get_attribute("value"))

    # Click the photo: the attention map depends on the point.
    photo = wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#photo img"))[0]
    photo.click()
    middle = wait(browser, lambda: shown(browser, "attention"))
    ActionChains(browser).move_to_element_with_offset(photo, -60, -40).click().perform()
    corner = wait(browser, lambda: (new := shown(browser, "attention")) not in (None, middle) and new)
    # Changing the stage keeps the selected point.
    slider = browser.find_element(By.CSS_SELECTOR, "#stage input[type=range]")
    slider.send_keys(Keys.ARROW_LEFT)
    wait(browser, lambda: shown(browser, "attention") not in (None, corner))
    if folder:
        time.sleep(1)
        browser.save_screenshot(str(folder / "demo.png"))

    # An upload changes the result.
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save(tmp_path / "mine.jpg")
    upload(browser, tmp_path / "mine.jpg")
    wait(browser, lambda: shown(browser, "result") not in (None, first))

    # An invalid image file gives a one-line error and the page stays usable.
    (tmp_path / "broken.png").write_bytes(b"this is no image")
    upload(browser, tmp_path / "broken.png")
    toast = wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".toast-body"))[0]
    wait(browser, lambda: "broken.png" in toast.text)
    assert "cannot read this image" in toast.text and "Traceback" not in toast.text
    if folder:
        browser.save_screenshot(str(folder / "demo-error.png"))
    # A one-pixel image is valid.
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    upload(browser, tmp_path / "pixel.png")
    wait(browser, lambda: "%" in words.get_attribute("value"))
    upload(browser, tmp_path / "mine.jpg")
    wait(browser, lambda: shown(browser, "result"))

    # The page does not overflow a phone screen.
    browser.set_window_size(420, 900)
    time.sleep(1)
    if folder:
        browser.save_screenshot(str(folder / "demo-narrow.png"))
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    assert not console.read_text().strip()  # no warnings, no tracebacks
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [e for e in severe if "127.0.0.1" not in e["message"] and "http" in e["message"]]


def test_invalid_arguments(tmp_path, capsys):
    import socket

    from crossformer_vision.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--port {port} on 127.0.0.1: in use, or not an address" in line
    assert main(["demo", str(tmp_path / "absent.ckpt")]) == 1
    assert "absent.ckpt: no such checkpoint file" in capsys.readouterr().err


@needs_a_browser
def test_arbitrary_files_are_not_served(url, tmp_path):
    import json
    from urllib.request import Request, urlopen

    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret.png")

    def asked(path):
        sent = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        body = json.dumps({"data": [sent, "crossformer_nano.cifar10", 0.5]}).encode()
        call = Request(f"{url}/gradio_api/call/predict", body, {"Content-Type": "application/json"})
        with urlopen(call) as answer:
            event = json.load(answer)["event_id"]
        with urlopen(f"{url}/gradio_api/call/predict/{event}") as answer:
            return answer.read().decode()

    said = asked(tmp_path / "secret.png")
    assert "%" not in said and ("[null" in said or "error" in said)
