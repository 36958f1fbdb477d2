"use strict";

// Sorting: by a click, or Enter or Space, on a column's head; again for the other way round.
function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const keyed = Array.from(body.rows, (row) => [row.cells[column].dataset.order ?? "", row]);
  const numeric = keyed.every(([key]) => key === "" || !Number.isNaN(Number(key)));
  const sign = descending ? -1 : 1;
  keyed.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (numeric) return sign * (Number(a) - Number(b));
    return sign * a.localeCompare(b, "en", { numeric: true });
  });
  body.append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.data")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      sortBy(table, column, descending);
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}

// Paper cannot be clicked: what is folded away is printed too.
const folded = [];
window.addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details:not([open])")) {
    each.open = true;
    folded.push(each);
  }
});
window.addEventListener("afterprint", () => {
  for (const each of folded.splice(0)) each.open = false;
});

// Boxes that have nothing to scroll are no stops for the keyboard.
function scrollStops() {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
window.addEventListener("resize", scrollStops);
scrollStops();
