"""Headless Chromium, for tests of web pages and for `make screenshots`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
WAIT_S = 60
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def installed() -> bool:
    return CHROMIUM.exists() and DRIVER.exists()


class Page:
    """A browser window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # a different fragment alone would not reload the page
        self.driver.get(address)

    def open_narrow(self, address: str, width: int) -> None:
        """Opens a page on a screen of this width, which may be narrower than a window can be."""
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.open(address)

    def wait_for(self, text: str) -> None:
        WebDriverWait(self.driver, WAIT_S).until(lambda driver: text in driver.find_element(By.TAG_NAME, "body").text)

    def follow(self, text: str) -> None:
        """Opens the first link whose text contains `text`."""
        link = (By.PARTIAL_LINK_TEXT, text)
        target = WebDriverWait(self.driver, WAIT_S).until(lambda driver: driver.find_element(*link))
        self.open(target.get_attribute("href"))

    def search(self, placeholder: str, text: str) -> None:
        field = (By.CSS_SELECTOR, f'input[placeholder="{placeholder}"]')
        WebDriverWait(self.driver, WAIT_S).until(lambda driver: driver.find_element(*field)).send_keys(text)

    def picture(self, path: Path, *, height: int) -> None:
        self.driver.set_window_size(1280, height)
        self.driver.save_screenshot(str(path))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A window with a new profile in folder `profile`."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile / 'chromium'}", "--window-size=1280,1000"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        yield Page(driver)
    finally:
        driver.quit()
