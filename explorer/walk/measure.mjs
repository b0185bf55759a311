/**
 * How long the first page takes, and how long scripts run for one frame while something is moved.
 *
 * Standard input: {browser, address, loads, steps}. An address with a token is loaded once, whatever `loads` says.
 * Standard output: {paint, drawn: milliseconds of each load to the first contentful paint and to the map's scatter,
 * frames: by what is moved lists of {script, task}, milliseconds of every step; idle: the same of steps without a move}.
 * `script` is what JavaScript ran, `task` all work of the main thread, layout and paint included.
 */

import { answer, at, launch, ready, wanted, watched } from "./browser.mjs";

const { browser: program, address, loads, steps } = wanted();

/** One cold load: a browser of its own, with nothing cached. */
async function load(page) {
  await page.addInitScript(() => {
    const seen = () => {
      if (!document.querySelector("main .scatter canvas")) return requestAnimationFrame(seen);
      requestAnimationFrame(() => (globalThis.drawn = performance.now()));
    };
    requestAnimationFrame(seen);
  });
  await page.goto(address);
  await page.waitForFunction(() => globalThis.drawn && performance.getEntriesByName("first-contentful-paint").length, null, { timeout: 60_000 });
  return page.evaluate(() => [performance.getEntriesByName("first-contentful-paint")[0].startTime, globalThis.drawn]);
}

/** What a step costs: from the input to the second frame after it. */
async function measured(page, moves) {
  const session = await page.context().newCDPSession(page);
  await session.send("Performance.enable");
  const figures = async () => {
    const { metrics } = await session.send("Performance.getMetrics");
    return ["ScriptDuration", "TaskDuration"].map((name) => 1000 * metrics.find((one) => one.name === name).value);
  };
  const expression = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))";
  const costs = [];
  for (let i = 0; i < steps; i++) {
    const before = await figures();
    await moves(i);
    await session.send("Runtime.evaluate", { expression, awaitPromise: true });
    const after = await figures();
    costs.push({ script: after[0] - before[0], task: after[1] - before[1] });
  }
  await session.detach();
  return costs;
}

/** Middle of an element, and from its left to its right end in as many steps. */
const boxOf = async (locator) => {
  await locator.scrollIntoViewIfNeeded();
  return locator.boundingBox();
};

const times = [];
let last;
for (let i = 0; i < (address.includes("token=") ? 1 : loads); i++) {
  await last?.close();
  last = await launch(program);
  const { page } = await watched(last, address);
  times.push(await load(page));
  last.page = page;
}
const { page } = last;
await ready(page);
const idle = await measured(page, () => {});
const frames = {};

const scatter = await boxOf(page.locator(".scatter"));
frames["pointer over the scatter"] = await measured(page, (i) => {
  const [u, v] = [0.06 + (0.88 * i) / steps, 0.75 - 0.5 * Math.abs(Math.sin(i))];
  return page.mouse.move(scatter.x + scatter.width * u, scatter.y + scatter.height * v);
});

await at(page, "#/map?least=1");
const slider = await boxOf(page.getByRole("slider", { name: /^least / }));
const middle = slider.y + slider.height / 2;
const along = (i) => slider.x + 8 + ((slider.width - 16) * i) / steps;
await page.mouse.move(along(0), middle);
await page.mouse.down();
frames["slider of the brush"] = await measured(page, (i) => page.mouse.move(along(i + 1), middle));
await page.mouse.up();

await at(page, "#/map?least=2");
await page.evaluate(() => scrollTo(0, 0));
const plot = await boxOf(page.locator(".scatter"));
await page.mouse.move(plot.x + plot.width * 0.5, plot.y + plot.height * 0.1);
await page.mouse.down();
await page.mouse.move(plot.x + plot.width * 0.5, plot.y + plot.height * 0.12);
frames["brush dragged in the scatter"] = await measured(page, (i) =>
  page.mouse.move(plot.x + plot.width * 0.5, plot.y + plot.height * (0.12 + (0.5 * i) / steps)),
);
await page.mouse.up();

await last.close();
answer({ paint: times.map(([paint]) => paint), drawn: times.map(([, drawn]) => drawn), idle, frames });
