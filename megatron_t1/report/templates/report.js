"use strict";
const form = document.getElementById("filter");
if (form) {
  const rows = [...document.querySelectorAll("#samples tbody tr")];
  const show = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const text = wanted.text.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = (wanted.source && row.dataset.source !== wanted.source)
        || (wanted.verdict && row.dataset.verdict !== wanted.verdict)
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
