/**
 * Pages whose texts try to become code, used all over, with their content security policy switched off, so that escaping
 * stands alone.
 *
 * Standard input: {browser, targets: [{name, address, texts}], pages: addresses beside those of the bar}.
 * Standard output: {failures, pages}: what ran, asked for something or became an element, and texts of a target that no page
 * of it shows as they are; how many pages were used.
 */

import { answer, at, launch, pagesOf, wanted, watched } from "./browser.mjs";

const FOREIGN =
  "img,iframe,object,embed,base,form:not([role=search]),video,audio,marquee,math,template,body link,body meta," +
  "[onerror],[onload],[onfocus],[onbegin],[ontoggle],[onstart]";
const { browser: program, targets, pages } = wanted();
const failures = [];
let used = 0;

/** Open and touch everything on a page. */
const use = (page) =>
  page.evaluate(async () => {
    const touched = document.querySelectorAll("main svg *, main td, main canvas, main .token, main .said");
    for (const kind of ["pointerenter", "pointermove", "focus"]) for (const each of touched) each.dispatchEvent(new PointerEvent(kind));
    for (const each of document.querySelectorAll("main details")) each.open = true;
    for (const each of document.querySelectorAll("main .behind button, main [aria-expanded]")) each.click();
    await new Promise((done) => setTimeout(done, 60));
  });

/** Every text of a document, also where a box, a title or a name has it. */
const shown = (page) =>
  page.evaluate(() => {
    const all = [document.title, document.documentElement.textContent];
    for (const each of document.querySelectorAll("main *, header *"))
      for (const name of ["title", "aria-label", "value"]) all.push(each.getAttribute(name) ?? "");
    for (const each of document.querySelectorAll("script")) all[1] = all[1].replace(each.textContent, "");
    return all.join("\n");
  });

const browser = await launch(program);
for (const { name, address, texts } of targets) {
  const missing = new Set(texts);
  const { page, faults, context } = await watched(browser, address, { bypassCSP: true });
  try {
    await page.goto(address);
    await page.waitForSelector("header nav a");
    for (const hash of [...(await pagesOf(page)), ...pages]) {
      await at(page, hash);
      await use(page);
      used++;
      const text = await shown(page);
      for (const one of missing) if (text.includes(one)) missing.delete(one);
      const foreign = await page.$$eval(FOREIGN, (found) => found.map((each) => each.outerHTML.slice(0, 200)));
      failures.push(...foreign.map((html) => `${name}, ${hash}: an element that is not ours: ${html}`));
    }
  } catch (error) {
    failures.push(`${name}: ${error.stack.slice(0, 600)}`);
  }
  const ran = await page.evaluate(() => document.documentElement.dataset.ran);
  if (ran !== undefined) failures.push(`${name}: poison ${ran} ran`);
  failures.push(...faults.map((fault) => `${name}: ${fault}`), ...[...missing].map((text) => `${name}: no page shows ${text}`));
  await context.close();
}
await browser.close();
answer({ failures, pages: used });
