// Tables as CSV, on the clipboard.

const line = (fields) =>
  fields
    .map((field) => {
      const text = field === null || field === undefined ? "" : String(field);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    })
    .join(",");

const csv = (head, rows) => [head, ...rows].map(line).join("\n") + "\n";

// A cell may become several columns: the column's name and what its keys add to it.
function csvOfTable(table) {
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.dataset.name);
  const rows = [...table.tBodies[0].rows].map((row) =>
    [...row.cells].map((cell) => JSON.parse(cell.dataset.csv)),
  );
  const ends = names.map((_, k) => [...new Set(rows.flatMap((row) => Object.keys(row[k])))]);
  return csv(
    names.flatMap((name, k) => ends[k].map((end) => name + end)),
    rows.map((row) => row.flatMap((cell, k) => ends[k].map((end) => cell[end]))),
  );
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers that keep the clipboard from pages of no server: the older way.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// Makes the text that a button copies, by what the button's data-copies says; tables make their own.
const copies = {};

for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const name = button.dataset.copies;
    const text = (copies[name] ?? (() => csvOfTable(document.getElementById(name))))();
    const lines = text.split("\n").length - 2;
    const done = await toClipboard(text);
    button.textContent = done ? "Copied" : "Not allowed by the browser";
    document.getElementById("copied").textContent = done ? `${lines} rows are copied.` : "";
    setTimeout(() => (button.textContent = label), 2000);
  });
}
