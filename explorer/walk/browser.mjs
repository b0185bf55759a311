/** One Chromium, its pages watched: what they log, ask for and show. Nothing is downloaded: the browser is the system's. */

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"];

/** What the caller wants, as JSON on standard input; it has at least `browser`, the program. */
export const wanted = () => JSON.parse(readFileSync(0, "utf8"));

/** Hand a result back. */
export const answer = (result) => process.stdout.write(JSON.stringify(result));

export const launch = (executablePath) => chromium.launch({ executablePath, args: FLAGS });

/** A page with the faults it had so far: errors, dialogs, and requests to anything but where it comes from. */
export async function watched(browser, address, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 1000 }, reducedMotion: "reduce", ...options });
  await context.addInitScript(() => {
    globalThis.asked = 0; // documents on their way
    const ask = globalThis.fetch;
    globalThis.fetch = (...what) => {
      globalThis.asked++;
      const answer = ask(...what);
      void answer.then((one) => one.clone().text()).finally(() => globalThis.asked--);
      return answer;
    };
    const make = URL.createObjectURL.bind(URL);
    URL.createObjectURL = (blob) => {
      globalThis.saved = blob.text(); // what a button saves as a file
      return make(blob);
    };
  });
  const page = await context.newPage();
  page.setDefaultTimeout(10_000);
  const faults = [];
  const own = new URL(address);
  const ours = (url) => {
    const { protocol, origin, pathname } = new URL(url);
    if (["data:", "blob:"].includes(protocol)) return true;
    return own.protocol === "file:" ? protocol === "file:" && pathname === own.pathname : origin === own.origin;
  };
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) faults.push(`console: ${message.text()} ${message.location().url}`);
  });
  page.on("pageerror", (error) => faults.push(`script: ${error.message}`));
  page.on("dialog", (dialog) => {
    faults.push(`dialog: ${dialog.message()}`);
    void dialog.dismiss();
  });
  page.on("popup", () => faults.push("a window was opened"));
  page.on("request", (request) => ours(request.url()) || faults.push(`request: ${request.url()}`));
  return { page, faults, context };
}

/** Wait until a page shows what it reads. */
export async function ready(page) {
  await page.waitForFunction(() => {
    const main = document.querySelector("#content main");
    return main && !globalThis.asked && !/Reading( the \w+ edges)? …/.test(main.textContent);
  });
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
}

/** Go to an address within the explorer. */
export async function at(page, hash) {
  await page.evaluate((to) => void (location.hash = to), hash);
  await ready(page);
}

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Violations of accessibility rules that are serious or critical, as sentences. */
export async function violations(page) {
  await page.evaluate(`${AXE};0`);
  const found = await page.evaluate(() =>
    globalThis.axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) =>
      violations
        .filter(({ impact }) => impact === "serious" || impact === "critical")
        .map(({ id, nodes }) => `${id}: ${nodes.length} × ${nodes[0].html.slice(0, 160)} (${nodes[0].failureSummary.replace(/\s+/g, " ").slice(0, 240)})`),
    ),
  );
  return found;
}

/** Pages that the bar names, as addresses. */
export const pagesOf = (page) => page.$$eval("header nav a", (links) => links.map((link) => link.getAttribute("href")));
