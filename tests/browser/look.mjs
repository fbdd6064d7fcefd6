// Opens a page in headless Chromium as a user would and says what it found, as JSON on stdout.
//   node look.mjs CHROMIUM PAGE [SCREENSHOT_PREFIX]
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.cwd()}/`); // node_modules of the folder it is started in
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const [executablePath, file, prefix] = process.argv.slice(2);
const address = pathToFileURL(file).href;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const found = { console: [], requests: [], views: {} };
try {
  for (const [name, options] of Object.entries({
    phone: { viewport: { width: 390, height: 844 }, colorScheme: "light" },
    desk: { viewport: { width: 1280, height: 900 }, colorScheme: "light" },
    dark: { viewport: { width: 1280, height: 900 }, colorScheme: "dark" },
    night: { viewport: { width: 390, height: 844 }, colorScheme: "dark" },
  })) {
    const context = await browser.newContext({ ...options, bypassCSP: true, offline: true, reducedMotion: "reduce" });
    const page = await context.newPage();
    page.on("console", (message) => found.console.push(`${message.type()}: ${message.text()}`));
    page.on("pageerror", (error) => found.console.push(String(error)));
    page.on("request", (request) => request.url() === address || found.requests.push(request.url()));
    await page.goto(address);
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    if (prefix) await page.screenshot({ path: `${prefix}-${name}.png`, fullPage: true });
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    found.views[name] = {
      overflow,
      violations: violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.target.join(" ")).slice(0, 5).join(", ")}`),
    };
    if (name === "desk") {
      found.read = await page.locator("body").ariaSnapshot();
      found.stops = await tabStops(page);
      await page.emulateMedia({ media: "print" });
      if (prefix) await page.screenshot({ path: `${prefix}-print.png`, fullPage: true });
      found.pdf = (await page.pdf({ format: "A4" })).length;
    }
    await context.close();
  }
} finally {
  await browser.close();
}
process.stdout.write(JSON.stringify(found));

// What the Tab key reaches, in order, and whether each can be seen to have the focus.
async function tabStops(page) {
  const stops = [];
  for (let i = 0; i < 200; i++) {
    await page.keyboard.press("Tab");
    const stop = await page.evaluate(() => {
      const at = document.activeElement;
      if (!at || at === document.body) return null;
      const box = at.getBoundingClientRect();
      const name = at.getAttribute("aria-label") || at.textContent.trim();
      const first = at.dataset.seen === undefined;
      at.dataset.seen = "";
      return { tag: at.tagName, name, first, outline: getComputedStyle(at).outlineStyle, inside: box.bottom > 0 && box.top < innerHeight };
    });
    if (!stop || !stop.first) break;
    stops.push(stop);
  }
  return stops;
}
