// Small services of the page: it works without them, but for the folder's names and sorted tables.
(() => {
  const FOLDER_MARK = "\u29f8"; // stands for / in names of uploads, which Gradio would cut off
  const MOST_FILES = 1000;
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // Scroll an answer into view where it lies below, as on a phone.
  window.reveal = (selector) => requestAnimationFrame(() => {
    const place = document.querySelector(selector);
    if (!place) return;
    const { top, bottom } = place.getBoundingClientRect();
    if (top > innerHeight * 0.6 || bottom < 0) {
      place.scrollIntoView({ behavior: still.matches ? "auto" : "smooth", block: "start" });
    }
  });

  // A folder's files carry their folders in their names, so that class folders can be read.
  document.addEventListener("change", (event) => {
    const box = event.target;
    if (!(box instanceof HTMLInputElement) || !box.webkitdirectory) return;
    const files = new DataTransfer();
    for (const file of [...box.files].slice(0, MOST_FILES)) {
      const path = file.webkitRelativePath || file.name;
      if (path.split("/").some((part) => part.startsWith("."))) continue;
      files.items.add(new File([file], path.replaceAll("/", FOLDER_MARK), { type: file.type }));
    }
    box.files = files.files;
  }, true);

  // Heads of tables sort: by number where all cells are, else by text.
  const prepare = (table) => {
    if (table.dataset.ready) return;
    table.dataset.ready = "yes";
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => sort(table, head, column));
    });
  };
  const sort = (table, head, column) => {
    const falling = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [row.cells[column].textContent.trim(), row]);
    const numeric = rows.every(([text]) => text !== "" && !Number.isNaN(Number(text)));
    rows.sort(([a], [b]) => (numeric ? Number(a) - Number(b)
      : a.localeCompare(b, "en", { numeric: true })) * (falling ? -1 : 1));
    body.append(...rows.map(([, row]) => row));
  };

  // Links to a tab open it.
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[data-tab]");
    if (!link) return;
    const tabs = [...document.querySelectorAll("[role=tab]")];
    tabs.find((tab) => tab.textContent.trim() === link.dataset.tab)?.click();
    event.preventDefault();
    setTimeout(() => document.querySelector(link.hash)?.scrollIntoView(), 50);
  });

  // What Gradio leaves unnamed: which box a button fills, and whether a fold is open.
  const name = (button) => {
    const label = button.parentElement.querySelector("[data-testid=block-label]");
    const text = label && `${label.textContent.trim()}: click to upload or drop files`;
    if (text && button.ariaLabel !== text) button.ariaLabel = text;
  };
  const fold = (button) => {
    const open = String(button.nextElementSibling?.style.display !== "none");
    if (button.ariaExpanded !== open) button.ariaExpanded = open;
  };
  const mend = () => {
    // A message's head is a button around its button to close.
    document.querySelectorAll(".toast-header[role]").forEach((head) => {
      head.removeAttribute("role");
      head.removeAttribute("tabindex");
    });
    document.querySelectorAll("table.sortable").forEach(prepare);
    document.querySelectorAll("button.upload-container").forEach(name);
    document.querySelectorAll("button.label-wrap").forEach(fold);
    document.querySelectorAll("#card pre, #card table").forEach((box) => { box.tabIndex = 0; });
  };
  new MutationObserver(mend).observe(document, {
    attributeFilter: ["style"], childList: true, subtree: true,
  });
})();
