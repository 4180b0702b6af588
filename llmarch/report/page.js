// Tables: a click (or Enter) on a heading sorts by it, numbers as numbers; a word in the box hides rows without it.
for (const box of document.querySelectorAll(".tablebox")) {
  const body = box.querySelector("tbody");
  const heads = [...box.querySelectorAll("th")];
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  heads.forEach((head, i) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numeric = [...body.rows].some((row) => row.cells[i].dataset.value !== undefined);
    const sign = up ? 1 : -1;
    const order = (a, b) => {
      const [x, y] = [value(a, i), value(b, i)];
      if (!numeric) return sign * x.localeCompare(y, undefined, {numeric: true});
      const [n, m] = [parseFloat(x), parseFloat(y)];
      return Number.isNaN(n) - Number.isNaN(m) || sign * (n < m ? -1 : n > m);  // without a number: last, either way
    };
    body.append(...[...body.rows].sort(order));
  }));
  box.querySelector("input")?.addEventListener("input", (event) => {
    const word = event.target.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
}
// Below a table that is wider than its place, words say that it goes on.
const measure = () => { for (const box of document.querySelectorAll(".tablebox")) {
  const inner = box.querySelector(".scroll");
  box.classList.toggle("wide", inner.scrollWidth > inner.clientWidth + 1);
} };
addEventListener("resize", measure);
for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", measure);
measure();
// Curves over steps, tokens or time: the radio buttons show one figure and hide the others.
for (const input of document.querySelectorAll(".choice input")) input.addEventListener("change", () => {
  for (const figure of document.querySelectorAll("figure[data-x]")) figure.hidden = figure.dataset.x !== input.value;
});
// What a mark of a chart stands for, as a tooltip.
for (const mark of document.querySelectorAll("svg [aria-label]")) {
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = mark.getAttribute("aria-label");
  mark.prepend(title);
}
