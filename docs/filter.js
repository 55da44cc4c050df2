// Tables of many rows get a box that filters them: rows stay that hold every word typed. Works offline, without a server.
document.addEventListener("DOMContentLoaded", () => {
  const MANY = 20;
  for (const table of document.querySelectorAll("table")) {
    const rows = [...table.querySelectorAll("tbody tr")];
    if (rows.length < MANY) continue;
    const label = document.createElement("label");
    const box = document.createElement("input");
    const count = document.createElement("output");
    label.className = "table-filter";
    box.type = "search";
    box.placeholder = "for example: hooks only";
    const show = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    box.addEventListener("input", show);
    label.append("Filter ", box, count);
    (table.closest(".md-typeset__scrollwrap") ?? table).before(label);
    show();
  }
});
