"use strict";
// The completions of a report, so many at a time. What they say is only ever text: no markup is built from it.
(() => {
  const data = document.getElementById("completion-data");
  if (!data) return;
  const perPage = 20;
  const rows = JSON.parse(data.textContent).map(([step, isEval, reward, facts, texts]) =>
    ({ step, isEval, reward, facts, texts }));
  const list = document.getElementById("completions");
  const place = document.getElementById("place");
  const controls = document.getElementById("controls");
  const field = (name) => controls.querySelector(`[name=${name}]`);
  let page = 0;

  function element(tag, text) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function article(row) {
    const made = element("article");
    const where = `${row.isEval ? "evaluation at step" : "step"} ${row.step}`;
    made.append(element("p", row.facts ? `${where} · ${row.facts}` : where));
    for (const [name, text] of row.texts) {
      const block = element("pre", text);
      block.dir = "auto";
      made.append(element("p", name), block);
    }
    return made;
  }

  function chosen() {
    const { step, split, low, high, order, text } =
      Object.fromEntries(["step", "split", "low", "high", "order", "text"].map((name) => [name, field(name).value]));
    const found = rows.filter((row) =>
      (step === "" || row.step === Number(step)) &&
      (split === "" || row.isEval === (split === "eval")) &&
      (low === "" || (row.reward !== null && row.reward >= Number(low))) &&
      (high === "" || (row.reward !== null && row.reward <= Number(high))) &&
      (text === "" || row.texts.some(([, words]) => words.includes(text))));
    if (order === "") return found;
    const sign = order === "low" ? 1 : -1;
    // Without a reward: last.
    const key = (row) => (row.reward === null ? Infinity : sign * row.reward);
    return found.sort((a, b) => (key(a) === key(b) ? 0 : key(a) - key(b)));
  }

  function show() {
    const found = chosen();
    page = Math.max(0, Math.min(page, Math.ceil(found.length / perPage) - 1));
    const from = page * perPage;
    const shown = found.slice(from, from + perPage);
    list.replaceChildren(...shown.map(article));
    place.textContent = found.length
      ? `${(from + 1).toLocaleString("en")} to ${(from + shown.length).toLocaleString("en")} of ${found.length.toLocaleString("en")}`
      : "none";
    field("back").disabled = page === 0;
    field("on").disabled = from + perPage >= found.length;
  }

  for (const step of [...new Set(rows.map((row) => row.step))].sort((a, b) => a - b)) {
    const option = element("option", step);
    option.value = step;
    field("step").append(option);
  }
  const kinds = new Set(rows.map((row) => row.isEval));
  field("split").closest("label").hidden = kinds.size < 2;
  field("back").addEventListener("click", () => { page -= 1; show(); });
  field("on").addEventListener("click", () => { page += 1; show(); });
  controls.addEventListener("input", () => { page = 0; show(); });
  controls.hidden = false;
  show();
})();
