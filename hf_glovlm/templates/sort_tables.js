"use strict";
// Columns of a table sort by a click or by Enter on their heads; numbers as numbers, empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        const text = cell ? (cell.dataset.value ?? cell.textContent).trim() : "";
        const number = Number.parseFloat(text.replace(/^[<>]/, ""));
        return { text, number };
      };
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (!a.text || !b.text) return a.text ? -1 : b.text ? 1 : 0;
        const both = !Number.isNaN(a.number) && !Number.isNaN(b.number);
        const order = both ? a.number - b.number : a.text.localeCompare(b.text);
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
