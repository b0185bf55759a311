/**
 * The five questions that the explorer answers, each by at most three clicks or keys from the map, and what must hold
 * throughout: an address restores its page, nothing fails or asks elsewhere, a keyboard suffices, and axe has no objection.
 *
 * Standard input: {browser, targets: [{name, address}], edge: [writer, reader, port] of a stored pair, vector: the name of
 * an attached direction in an atlas compared with another, or null where neither is there, heads}. Tables and axe take the
 * first of the targets.
 * Standard output: {failures, tables}; of each of the heads its tables, as they are saved, by their names.
 */

import { answer, at, launch, pagesOf, ready, violations, wanted, watched } from "./browser.mjs";

const MOST = 3;
const { browser: program, targets, edge, vector, heads } = wanted();
const [writer, reader, port] = edge;
const failures = [];

/** What an address has to restore. */
const stateOf = (page) =>
  page.evaluate(() => ({
    hash: location.hash,
    theme: document.documentElement.dataset.theme,
    heading: document.querySelector("#content h1")?.innerText,
    selected: [...document.querySelectorAll("tr.selected, .effect-row.selected, .pinned")].map((each) => each.textContent),
    pressed: [...document.querySelectorAll("[aria-pressed=true]")].map((each) => each.textContent),
    values: [...document.querySelectorAll("main input, main select")].map((each) => each.value),
    arcs: document.querySelectorAll(".arc").length,
  }));

/** A question, asked from the map. */
class Question {
  constructor(page, name) {
    Object.assign(this, { page, name, steps: 0 });
  }

  /** One click or key, after which a reload restores the page. */
  async step(does) {
    this.steps++;
    await does(this.page);
    await ready(this.page);
    const before = await stateOf(this.page);
    await this.page.reload();
    await ready(this.page);
    let after = await stateOf(this.page);
    for (let tries = 0; tries < 40 && JSON.stringify(after) !== JSON.stringify(before); tries++) {
      await this.page.waitForTimeout(50); // what is read may come later
      after = await stateOf(this.page);
    }
    for (const key of Object.keys(before)) {
      const [was, is] = [before[key], after[key]].map((value) => JSON.stringify(value));
      this.check(was === is, `a reload after step ${this.steps} makes ${key} ${is}, it was ${was}`);
    }
  }

  check(holds, says) {
    if (!holds) failures.push(`${this.name}: ${says}`);
  }
}

async function ask(page, name, from, body) {
  const question = new Question(page, name);
  await at(page, from);
  try {
    await body(question);
  } catch (error) {
    failures.push(`${name}: step ${question.steps}: ${error.message.split("\n").slice(0, 2).join(" ")}`);
  }
  question.check(question.steps <= MOST, `it took ${question.steps} steps`);
}

const slider = (page) => page.getByRole("slider", { name: /^least / });
const rows = (page) => page.locator("table.edges tbody tr");

async function whereToLook(page, name) {
  await ask(page, `${name}, where to look`, "#/map", async (question) => {
    const largest = Number(await slider(page).getAttribute("max"));
    const least = String(Math.round(largest * 5) / 10);
    await question.step(async () => {
      await slider(page).fill(least);
      await page.waitForFunction((value) => location.hash.includes(`least=${value}`), least); // once it has come to rest
    });
    question.check((await slider(page).inputValue()) === least, "the slider does not stay where it was put");
    question.check(page.url().includes(`least=${least}`), "the address has not what the slider is at");
    await question.step(() => rows(page).first().click());
    question.check(/pin=L\d+H\d+>L\d+H\d+\.[QKV]/.test(decodeURIComponent(page.url())), "the address has no pin");
    question.check((await page.locator(".arc.chosen").count()) === 1, "no arc on the stream is that of the pinned edge");
    question.check((await page.locator("tr.selected").count()) === 1, "not one row is selected");
  });
}

async function whoFeeds(page, name) {
  await ask(page, `${name}, who feeds this head`, "#/map", async (question) => {
    await question.step(() => page.locator(".stream .head", { has: page.locator(`title:text-is("${reader}")`) }).click());
    question.check((await page.locator(".card h1").innerText()).startsWith(reader), "it is not the head's page");
    const first = page.locator(".side").first().locator("ol");
    question.check((await first.count()) === 3, "not three ports list their writers");
    for (const list of await first.all()) question.check((await list.locator("li").count()) > 2, "a port lists no writers");
  });
}

async function whatItCarries(page, name) {
  await ask(page, `${name}, what this edge carries`, `#/map?port=${port}&least=-9&pin=${writer}>${reader}.${port}`, async (question) => {
    await question.step(() => page.getByRole("button", { name: "Open the pair" }).click());
    question.check((await page.locator("h1").innerText()).replace(/\s+/g, " ").includes(`${writer} → ${reader}.${port}`), "it is not the pair's page");
    question.check(/\d+ gains, \d+ above/.test(await page.locator("svg[aria-label*=' gains,']").getAttribute("aria-label")), "no gains are shown");
    question.check((await page.locator("table.tokens tbody tr, .main .note").count()) > 0, "no directions are shown");
  });
}

async function whetherItMatters(page, name) {
  await ask(page, `${name}, whether it matters`, "#/map", async (question) => {
    await question.step(() => page.getByRole("link", { name: "Effects" }).click());
    const effects = page.locator(".effect-row");
    await question.step(() => effects.last().click());
    question.check((await page.locator(".effect-row.selected").count()) === 1, "no edge is selected");
    question.check((await effects.last().getAttribute("aria-pressed")) === "true", "it is another edge that is selected");
    question.check(page.url().includes("sel="), "the address has no selection");
  });
}

async function whatChanged(page, name) {
  await ask(page, `${name}, what changed`, "#/map", async (question) => {
    await question.step(() => page.getByRole("link", { name: "Compare" }).click());
    question.check((await rows(page).count()) > 0, "no difference is listed");
    await question.step(() => rows(page).nth(1).click());
    question.check((await page.locator("tr.selected").count()) === 1, "not one row is selected");
    question.check(page.url().includes("pin="), "the address has no pin");
    question.check((await page.locator(".over circle.pin").count()) === 1, "the plot has no mark for it");
    await question.step(() => page.getByRole("button", { name: "Open the pair" }).click());
    question.check(page.url().includes("#/pair/"), "it does not open the pair");
  });
}

async function whereAVectorGoes(page, name) {
  await ask(page, `${name}, where a vector goes`, "#/map", async (question) => {
    await question.step(() => page.getByRole("link", { name: "Structure" }).click());
    await question.step(() => page.getByRole("link", { name: "Attached directions" }).click());
    await question.step(() => page.getByRole("link", { name: vector, exact: true }).click());
    question.check((await page.locator("h1").innerText()) === vector, "it is not the vector's page");
    for (const title of ["Heads that write along it", "Heads that read it"])
      question.check((await page.locator("h3", { hasText: title }).count()) === 1, `it lists no ${title}`);
  });
}

/** The same without a pointer. */
async function keyboard(page, name) {
  const question = new Question(page, `${name}, by keys`);
  const focus = () => page.evaluate(() => document.activeElement?.getAttribute("class") ?? document.activeElement?.tagName);
  await at(page, "#/map");
  await page.reload();
  await ready(page);
  let tabs = 0;
  while (tabs < 20 && (await focus()) !== "over") {
    await page.keyboard.press("Tab");
    tabs++;
  }
  question.check(tabs < 20, "no tabulator reaches the scatter");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowLeft");
  const pin = /pin=([^&]*)/.exec(decodeURIComponent(page.url()))?.[1];
  question.check(pin !== undefined, "arrows in the scatter pin nothing");
  await page.keyboard.press("Enter");
  await ready(page);
  question.check(decodeURIComponent(page.url()).endsWith(`#/pair/${pin?.replace(">", "/")}`), "Enter in the scatter does not open the pair");
  await page.keyboard.press("Escape");
  await page.waitForFunction(() => location.hash.startsWith("#/map"));
  await page.keyboard.press("/");
  question.check((await page.evaluate(() => document.activeElement?.getAttribute("list"))) === "heads", "/ does not go to the search");
  await page.keyboard.type(`${writer} > ${reader}.${port}`);
  await page.keyboard.press("Enter");
  await ready(page);
  question.check(page.url().endsWith(`#/pair/${writer}/${reader}.${port}`), "the search does not open an edge");
  await page.keyboard.press("Escape");
  question.check((await page.evaluate(() => document.activeElement === document.body)), "Esc does not leave the search");
  await page.keyboard.press("?");
  question.check((await page.getByRole("dialog", { name: "keys" }).count()) === 1, "? does not show the keys");
  await page.keyboard.press("Escape");
  question.check((await page.getByRole("dialog").count()) === 0, "Esc does not close them");
  await page.keyboard.press("t");
  question.check((await page.getByRole("dialog").count()) === 1, "t does not show a table");
  await page.keyboard.press("Escape");
  question.check((await page.getByRole("dialog").count()) === 0, "Esc does not close the table");
}

/** Every page in both themes, and what lies over a page. */
async function accessible(page, name) {
  const others = [`#/head/${reader}`, `#/pair/${writer}/${reader}.${port}`, "#/vector", `#/vector/${vector ?? ""}`, "#/compare", "#/nowhere"];
  const pages = new Set([...(await pagesOf(page)), ...others]);
  for (const theme of ["light", "dark"]) {
    if ((await page.evaluate(() => document.documentElement.dataset.theme)) !== theme) await page.locator("button.theme").click();
    for (const hash of pages) {
      await at(page, hash);
      await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
      failures.push(...(await violations(page)).map((text) => `${name}, ${hash}, ${theme}: ${text}`));
    }
    await at(page, "#/map?least=0");
    await rows(page).first().click();
    await page.locator(".behind button").first().click();
    await page.keyboard.press("?");
    failures.push(...(await violations(page)).map((text) => `${name}, a pin, a table and the keys, ${theme}: ${text}`));
    await page.keyboard.press("Escape");
    await page.keyboard.press("Escape");
  }
}

/** The tables behind the strips of each head, by the names under which they are saved. */
async function tablesOf(page) {
  const tables = {};
  for (const head of heads) {
    await at(page, `#/head/${head}`);
    Object.assign(
      tables,
      await page.evaluate(async () => {
        const saved = {};
        for (const behind of document.querySelectorAll(".strip .behind")) {
          const [table, csv] = behind.querySelectorAll("button");
          table.click();
          await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          const sheet = behind.querySelector("[role=dialog]");
          const shown = sheet.querySelectorAll("tbody tr").length;
          const name = sheet.getAttribute("aria-label");
          sheet.querySelector("button").click();
          csv.click();
          saved[name] = await globalThis.saved;
          if (Math.min(500, saved[name].split("\n").length - 1) !== shown) saved[name] = `the table shows ${shown} rows`;
        }
        return saved;
      }),
    );
  }
  return tables;
}

const browser = await launch(program);
let tables = {};
for (const [i, { name, address }] of targets.entries()) {
  const { page, faults, context } = await watched(browser, address);
  try {
    await page.goto(address);
    await ready(page);
    for (const part of [whereToLook, whoFeeds, whatItCarries, whetherItMatters, keyboard]) await part(page, name);
    if (vector) for (const part of [whatChanged, whereAVectorGoes]) await part(page, name);
    if (i === 0) {
      tables = await tablesOf(page);
      await accessible(page, name);
    }
  } catch (error) {
    failures.push(`${name}: ${error.stack.slice(0, 600)}`);
  }
  failures.push(...faults.map((fault) => `${name}: ${fault}`));
  await context.close();
}
await browser.close();
answer({ failures, tables });
