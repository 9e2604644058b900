"use strict";
// On a phone a row with a header above it is a card, and each cell says its column: see .stacks.
for (const table of document.querySelectorAll(".scroll table")) {
  const [head, ...rows] = table.rows;
  if (!head || [...head.cells].some((cell) => cell.tagName !== "TH")) continue;
  table.classList.add("stacks");
  for (const row of rows) [...row.cells].forEach((cell, i) => { cell.dataset.label = head.cells[i].textContent; });
}
const form = document.getElementById("filter");
if (form) {
  const chosen = [...form.querySelectorAll("select")];
  const rows = [...document.querySelectorAll("#samples tbody tr")];
  const show = () => {
    const text = form.elements.text.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = chosen.some((select) => select.value && !row.dataset[select.name].split("|").includes(select.value))
        || !row.textContent.toLowerCase().includes(text);
      shown += !row.hidden;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  // report.html#verdict=wrong&text=mod shows that: a filter can be sent to somebody.
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  form.addEventListener("input", () => {
    const chosen = [...new FormData(form)].filter(([, value]) => value);
    history.replaceState(null, "", "#" + new URLSearchParams(chosen));
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
