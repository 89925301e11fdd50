"use strict";
// Sorting, filtering and choosing only: without this script the pages say the same.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const plain = (text) => text.replace(/\s+/g, " ").trim().toLowerCase();

  // -- sorting: up, down, and back to the page's own order
  const key = (cell) => {
    if (!cell.hasAttribute("data-v")) return plain(cell.textContent);
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
  for (const table of all("table.data")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const original = [...body.rows];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = NEXT[head.getAttribute("aria-sort") ?? "none"];
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (next !== "none") head.setAttribute("aria-sort", next);
        const sign = next === "descending" ? -1 : 1;
        const rows = original.map((row, place) => ({ row, place, key: key(row.cells[column]) }));
        if (next !== "none") {
          rows.sort((a, b) => {
            if ((a.key === null) !== (b.key === null)) return a.key === null ? 1 : -1; // empty cells stay last
            return (a.key === null ? 0 : sign * compare(a.key, b.key)) || a.place - b.place;
          });
        }
        body.append(...rows.map((entry) => entry.row));
      });
    });
  }

  // -- filtering: rows that hold every word, and the chosen value of every list; the address says what was chosen
  const holds = (text, word) => (/^\d+$/.test(word) ? new RegExp(`(^|\\D)${word}(\\D|$)`).test(text) : text.includes(word));
  for (const form of all("form.controls[data-for]")) {
    const place = document.getElementById(form.dataset.for);
    const rows = all("tbody tr", place);
    const texts = rows.map((row) => plain(`${row.textContent} ${row.dataset.search ?? ""}`));
    const lists = all("select[data-key]", form);
    const nothing = document.querySelector(".nothing");
    const also = form.dataset.also ? document.getElementById(form.dataset.also) : null; // what a search finds besides
    const found = also ? all("li", also).map((item) => ({ item, text: plain(`${item.textContent} ${item.dataset.search ?? ""}`) })) : [];
    const apply = () => {
      const words = plain(form.elements.search.value).split(" ").filter(Boolean);
      const chosen = lists.filter((list) => list.value);
      let shown = 0;
      rows.forEach((row, i) => {
        const fits = (list) => row.dataset[list.dataset.key].split(" ").includes(list.value);
        row.hidden = !(words.every((word) => holds(texts[i], word)) && chosen.every(fits));
        shown += !row.hidden;
      });
      for (const block of all(".block", place)) block.hidden = all("tbody tr", block).every((row) => row.hidden);
      form.querySelector("output").textContent = words.length || chosen.length ? `${shown} of ${rows.length}` : "";
      let hits = 0;
      if (also) {
        for (const { item, text } of found) item.hidden = !words.every((word) => holds(text, word));
        hits = found.filter(({ item }) => !item.hidden).length;
        also.open = words.length > 0 && hits > 0 && (hits <= 60 || !shown);
        also.hidden = words.length > 0 && !hits;
      }
      if (nothing) nothing.hidden = shown > 0 || (words.length > 0 && hits > 0) || !rows.length;
    };
    const fields = { search: form.elements.search, ...Object.fromEntries(lists.map((list) => [list.dataset.key, list])) };
    const restore = () => {
      if (!location.hash.startsWith("#?")) return;
      const wanted = new URLSearchParams(location.hash.slice(2));
      for (const [name, input] of Object.entries(fields)) input.value = wanted.get(name) ?? "";
    };
    form.addEventListener("input", () => {
      apply();
      const chosen = Object.entries(fields).filter(([, input]) => input.value);
      history.replaceState(null, "", `#?${new URLSearchParams(chosen.map(([name, input]) => [name, input.value]))}`);
    });
    addEventListener("hashchange", () => {
      restore();
      apply();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = !rows.length;
    restore();
    apply(); // a browser that comes back may have kept what was typed
  }

  // -- choosing one board
  const pick = document.querySelector("form.pick");
  let show = () => false;
  if (pick) {
    const leaderboards = all(".leaderboard");
    const { model, metric, budget } = pick.elements;
    const fill = (list, values, wanted) => {
      const unique = [...new Set(values)];
      list.replaceChildren(...unique.map((value) => new Option(value, value)));
      list.value = unique.includes(wanted) ? wanted : unique[0];
    };
    const ofModel = () => leaderboards.filter((c) => c.dataset.model === model.value);
    const twin = (c) => ofModel().some((other) => other !== c && other.dataset.metric === c.dataset.metric);
    const label = (c) => (twin(c) ? `${c.dataset.metric} (${c.dataset.settings})` : c.dataset.metric);
    const current = () => ofModel().find((c) => label(c) === metric.value);
    const budgets = (c) => all(".block", c).map((block) => block.dataset.budget);
    const update = () => {
      fill(metric, ofModel().map(label), metric.value);
      const chosen = current();
      fill(budget, [...budgets(chosen), "all"], budget.value);
      for (const c of leaderboards) c.hidden = c !== chosen;
      for (const block of all(".block", chosen)) block.hidden = budget.value !== "all" && block.dataset.budget !== budget.value;
      const entries = all(".block", chosen).filter((block) => !block.hidden);
      pick.querySelector("output").textContent = `${entries.reduce((n, block) => n + block.querySelectorAll("tbody tr").length, 0)} entries`;
    };
    show = (id) => {
      const block = document.getElementById(id);
      const chosen = block && block.closest(".leaderboard");
      if (!chosen) return false;
      model.value = chosen.dataset.model;
      fill(metric, ofModel().map(label), label(chosen));
      fill(budget, [...budgets(chosen), "all"], block.dataset.budget ?? budget.value);
      update();
      return true;
    };
    fill(model, leaderboards.map((c) => c.dataset.model));
    pick.addEventListener("input", () => {
      update();
      const block = all(".block", current()).find((b) => !b.hidden);
      history.replaceState(null, "", `#${budget.value === "all" ? current().id : block.id}`);
    });
    pick.addEventListener("submit", (event) => event.preventDefault());
    pick.hidden = false;
    update();
  }

  // -- arriving: a link to a run opens it; anchors of the time when all papers shared a page lead to their own
  const arrive = () => {
    const id = decodeURIComponent(location.hash.slice(1));
    if (!id || id.startsWith("?") || show(id)) return;
    const target = document.getElementById(id);
    if (!target) {
      const row = all("#papers tbody tr[id]").find((r) => id.startsWith(`${r.id}-`));
      if (row) location.replace(`${row.id}/index.html#${id}`);
      return;
    }
    const closed = target.closest("details:not([open])");
    if (closed) {
      closed.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", arrive);
  arrive();
})();
