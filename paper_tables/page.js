"use strict";
// Sorting and filtering only: without this script the page says the same.
(() => {
  const tables = [...document.querySelectorAll("table.data")];

  const key = (cell) => {
    if (!cell.hasAttribute("data-v")) return cell.textContent.trim().toLowerCase();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));

  for (const table of tables) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const original = [...body.rows];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        // up, down, and back to the paper's own order
        const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort") ?? "none"];
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

  const field = document.getElementById("filter");
  const count = document.querySelector("output[for=filter]");
  const rows = tables.flatMap((table) => [...table.tBodies[0].rows]);
  const texts = new Map(rows.map((row) => [row, row.textContent.replace(/\s+/g, " ").toLowerCase()]));
  field.closest(".filter").hidden = false;
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => texts.get(row).includes(word));
      shown += !row.hidden;
    }
    for (const table of tables) table.closest(".block").hidden = [...table.tBodies[0].rows].every((row) => row.hidden);
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });

  // A link to a run opens it, also in browsers that do not do so themselves.
  const reveal = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const closed = target && target.closest("details:not([open])");
    if (closed) {
      closed.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
