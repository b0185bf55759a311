/**
 * Pictures of every page of a report.
 *
 *     node explorer/walk/pictures.mjs demo/atlas/report.html FOLDER          every page, light and dark, at three widths,
 *                                                                            and the map as it prints
 *     node explorer/walk/pictures.mjs demo/atlas/report.html NAME.png HASH   one page, light, 1440 wide
 *
 * The second makes the picture of the README: docs/images/explorer.png of '#/map?pin=L17H8>L18H7.K'.
 */

import { accessSync, constants, mkdirSync } from "node:fs";
import { delimiter, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { at, launch, pagesOf, ready, watched } from "./browser.mjs";

const SIZES = { 390: { height: 844, deviceScaleFactor: 2, isMobile: true, hasTouch: true }, 1280: { height: 800 }, 1920: { height: 1080 } };

const runs = (file) => {
  try {
    return accessSync(file, constants.X_OK) ?? true;
  } catch {
    return false;
  }
};

/** The system's browser. */
const program = () =>
  ["chromium", "chromium-browser", "google-chrome"]
    .flatMap((name) => process.env.PATH.split(delimiter).map((folder) => join(folder, name)))
    .find(runs);

const [report, to, hash] = process.argv.slice(2);
const address = pathToFileURL(resolve(report)).href;
const browser = await launch(program());

async function opened(width, colorScheme) {
  const { height, ...device } = SIZES[width] ?? { height: 900 };
  const { page, context, faults } = await watched(browser, address, { viewport: { width, height }, colorScheme, ...device });
  await page.goto(address);
  await ready(page);
  return { page, context, faults };
}

/** Pages of the bar, the pair and the head that the map has foremost, and a direction, by what their pictures are called. */
async function pages(page) {
  const names = Object.fromEntries((await pagesOf(page)).map((one) => [one.replace("#/", ""), one]));
  const pair = await page.evaluate(() => {
    const map = JSON.parse(document.getElementById("documents").textContent).map;
    return { pair: Object.keys(map.stored).find((name) => name.includes("/")), vector: Object.keys(map.vectors ?? {})[0] };
  });
  if (pair.pair) Object.assign(names, { pair: `#/pair/${pair.pair}`, head: `#/head/${/\/([^.]+)/.exec(pair.pair)[1]}` });
  if (pair.vector) names.vector = `#/vector/${encodeURIComponent(pair.vector)}`;
  return names;
}

if (hash) {
  const { page } = await opened(1440, "light");
  await at(page, hash);
  await page.screenshot({ path: to, fullPage: true });
} else {
  mkdirSync(to, { recursive: true });
  for (const width of Object.keys(SIZES).map(Number)) {
    for (const theme of ["light", "dark"]) {
      const { page, context, faults } = await opened(width, theme);
      for (const [name, one] of Object.entries(await pages(page))) {
        await at(page, one);
        await page.evaluate(() => scrollTo(0, 0));
        await page.screenshot({ path: join(to, `${name}-${width}-${theme}.png`), fullPage: true });
        const wider = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        if (wider > 0) console.log(`${name} at ${width}: ${wider} pixels wider than the window`);
      }
      if (width === 1280 && theme === "light") {
        await at(page, "#/map");
        await page.pdf({ path: join(to, "map.pdf"), format: "A4", landscape: true, printBackground: true });
      }
      faults.forEach((fault) => console.log(width, theme, fault));
      await context.close();
    }
  }
}
await browser.close();
