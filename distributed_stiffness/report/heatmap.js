// The heat map: the matrix of one checkpoint, the pair of classes under the pointer, its course.

const element = (id) => document.getElementById(id);
const source = element("matrices");
if (source) explore(JSON.parse(source.textContent));

function explore(data) {
  const INK = "#1c2126", SOFT = "#55606b", GREY = [204, 204, 204], FONT = '"DejaVu Sans", system-ui, sans-serif';
  const MOST = 560; // pixels along a side of the matrix
  const colours = data.colours.map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
  const canvas = element("heatmap"), trace = element("trace");
  const dims = ["learning_rate", "seed", "iteration"];
  const chosen = { matrix: 0, measure: "sign", learning_rate: 0, seed: 0, iteration: data.iteration.length - 1 };
  let pair = null; // row and column of the cell that is named
  let drawn = null; // where the cells are on the canvas, in CSS pixels

  // ---- numbers -------------------------------------------------------------------------------

  const decoded = new Map(); // by text: each is decoded when it is first looked at
  function numbers(text, type) {
    if (!decoded.has(text)) {
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      decoded.set(text, new type(bytes.buffer));
    }
    return decoded.get(text);
  }

  const matrix = () => data.matrices[chosen.matrix];
  const checkpoint = (iteration = chosen.iteration) =>
    (chosen.learning_rate * data.seed.length + chosen.seed) * data.iteration.length + iteration;

  function place(a, b) {
    const n = matrix().names.length;
    if (!matrix().symmetric) return a * n + b;
    const [low, high] = a < b ? [a, b] : [b, a];
    return low * n - (low * (low - 1)) / 2 + (high - low);
  }

  function small(part, at, k) {
    if (!part || !part[at]) return NaN;
    const whole = numbers(part[at], Int16Array)[k];
    return whole === data.missing ? NaN : whole / data.scale;
  }

  // What is known of a pair of classes: its mean, errors over examples and over seeds, pairs.
  function cell(a, b, measure = chosen.measure, iteration = chosen.iteration) {
    const one = matrix(), at = checkpoint(iteration), k = place(a, b);
    const ofMean = chosen.learning_rate * data.iteration.length + iteration;
    return {
      mean: small(one.means[measure], at, k),
      error: small(one.errors[measure], at, k),
      // Only the mean over seeds has an error over seeds.
      seedError: data.seed[chosen.seed] === "mean" ? small(one.seed_errors[measure], ofMean, k) : NaN,
      pairs: numbers(one.pairs.counts[one.pairs.at[measure][at]], Float64Array)[k],
    };
  }

  // ---- words, as in the tables of the page ---------------------------------------------------

  function number(value, digits) {
    if (!Number.isFinite(value)) return "–";
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }

  function measured({ mean, error, seedError }, digits = 2) {
    if (!Number.isFinite(mean) || !Number.isFinite(error)) return number(mean, digits);
    while (digits < 4 && error > 0 && error < 0.5 * 10 ** -digits) digits += 1;
    const text = `${number(mean, digits)} ± ${number(error, digits)}`;
    return Number.isFinite(seedError) ? `${text} (± ${number(seedError, digits)})` : text;
  }

  function name(k, side) {
    const text = matrix().names[k];
    return data.splits ? `${text} (${data.splits[side]})` : text;
  }

  const counted = (n) => `${Math.round(n).toLocaleString("en-US")} ${n === 1 ? "pair" : "pairs"}`;
  const sentence = ([a, b]) => {
    const found = cell(a, b);
    const text = found.pairs > 0 ? `${measured(found)}, ${counted(found.pairs)}` : "no pairs yet";
    return `${name(a, 0)} – ${name(b, 1)}: ${text}`;
  };

  // ---- drawing -------------------------------------------------------------------------------

  function colour(value, limit) {
    if (!Number.isFinite(value)) return GREY;
    const k = Math.floor(((value + limit) / (2 * limit)) * colours.length);
    return colours[Math.min(Math.max(k, 0), colours.length - 1)];
  }

  // Sizes a canvas for its width on the page and the pixels of the screen.
  function prepare(target, width, height) {
    const scale = window.devicePixelRatio || 1;
    target.width = Math.round(width * scale);
    target.height = Math.round(height * scale);
    const pen = target.getContext("2d");
    pen.scale(scale, scale);
    return pen;
  }

  function shortened(pen, text, width) {
    if (pen.measureText(text).width <= width) return text;
    let left = text.length;
    while (left > 1 && pen.measureText(text.slice(0, left) + "…").width > width) left -= 1;
    return text.slice(0, left) + "…";
  }

  // An image of one pixel for each colour.
  function pixels(rows) {
    const made = document.createElement("canvas");
    made.width = rows[0].length;
    made.height = rows.length;
    const flat = rows.flatMap((row) => row.flatMap((rgb) => [...rgb, 255]));
    const image = new ImageData(Uint8ClampedArray.from(flat), made.width);
    made.getContext("2d").putImageData(image, 0, 0);
    return made;
  }

  const bar = pixels([colours]);
  let last = null; // the image of the matrix that was drawn last: it stays while the pointer moves
  function picture() {
    const { names, limits } = matrix();
    const key = [chosen.matrix, chosen.measure, checkpoint()].join();
    if (last?.key === key) return last;
    const means = names.map((_, a) => names.map((_, b) => cell(a, b).mean));
    const rows = means.map((row) => row.map((mean) => colour(mean, limits[chosen.measure])));
    const incomplete = !means.every((row) => row.every(Number.isFinite));
    last = { key, image: pixels(rows), incomplete };
    return last;
  }

  // Digits of the numbers along a scale.
  const digits = (limit) => (limit < 0.1 ? 3 : 2);

  // What stands along the axes: every name where there is room, else super-classes, else some.
  function ticks(side) {
    const { names, groups } = matrix(), n = names.length, size = side / n;
    if (size >= 10) return { labels: names.map((text, k) => [k + 0.5, text]), font: Math.min(12, size) };
    if (groups.length) {
      let start = 0;
      const labels = groups.map(([text, count]) => [(start += count) - count / 2, text]);
      return { labels, font: Math.min(11, (side / groups.length) * 0.9), borders: true };
    }
    const every = Math.ceil(11 / size);
    return { labels: names.flatMap((text, k) => (k % every ? [] : [[k + 0.5, text]])), font: 10 };
  }

  function draw() {
    const width = canvas.parentElement.clientWidth;
    if (!width) return;
    const { names, groups } = matrix(), n = names.length, limit = matrix().limits[chosen.measure];
    const ruler = trace.getContext("2d");
    ruler.font = `12px ${FONT}`;
    const shown = groups.length && n > width / 14 ? groups.map(([text]) => text) : names;
    const longest = Math.max(...shown.map((text) => ruler.measureText(text).width));
    const margin = Math.ceil(Math.min(longest, 0.3 * width, 150)) + 14;
    // On the screen as a whole, names and scale too.
    const high = Math.max(window.innerHeight - margin - 80, 320);
    const side = Math.floor(Math.min(width - margin - 8, MOST, high));
    const left = margin + Math.floor((width - margin - 8 - side) / 2), top = 8, size = side / n;
    const pen = prepare(canvas, width, top + side + margin + 62);
    drawn = { left, top, side };
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, width, canvas.height);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture().image, left, top, side, side);
    const { labels, font, borders } = ticks(side);
    const flat = longest < size - 8; // names below the columns that need not be turned
    if (borders) drawBorders(pen, size);
    if (size >= 36) drawNumbers(pen, size, limit);
    pen.strokeStyle = SOFT;
    pen.lineWidth = 1;
    pen.strokeRect(left - 0.5, top - 0.5, side + 1, side + 1);
    pen.font = `${font}px ${FONT}`;
    pen.fillStyle = INK;
    pen.textBaseline = "middle";
    // A label makes room for that of the named cell.
    const free = (at, k) => !pair || Math.abs(at - pair[k] - 0.5) * size > 15;
    for (const [at, text] of labels) {
      const label = shortened(pen, text, margin - 14);
      pen.textAlign = "right";
      if (free(at, 0)) pen.fillText(label, left - 6, top + at * size);
      if (free(at, 1)) below(pen, left + at * size, top + side, flat, () => pen.fillText(label, 0, 0));
    }
    if (pair) drawPair(pen, size, margin, flat);
    drawBar(pen, top + side + margin + 12, limit);
  }

  // Writes below a column: from left to right, or turned, its end at the column.
  function below(pen, x, y, flat, write) {
    pen.save();
    pen.translate(x, y + (flat ? 13 : 6));
    if (flat) pen.textAlign = "center";
    else pen.rotate(-Math.PI / 2);
    write();
    pen.restore();
  }

  function drawBorders(pen, size) {
    const { left, top, side } = drawn;
    pen.strokeStyle = SOFT;
    pen.lineWidth = 0.5;
    pen.beginPath();
    let at = 0;
    for (const [, count] of matrix().groups.slice(0, -1)) {
      at += count;
      pen.moveTo(left, top + at * size);
      pen.lineTo(left + side, top + at * size);
      pen.moveTo(left + at * size, top);
      pen.lineTo(left + at * size, top + side);
    }
    pen.stroke();
  }

  function drawNumbers(pen, size, limit) {
    const n = matrix().names.length;
    pen.font = `${Math.min(12, size / 3.4)}px ${FONT}`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (let a = 0; a < n; a++)
      for (let b = 0; b < n; b++) {
        const { mean } = cell(a, b);
        const [red, green, blue] = colour(mean, limit);
        pen.fillStyle = 0.3 * red + 0.59 * green + 0.11 * blue > 140 ? INK : "#ffffff";
        pen.fillText(number(mean, 2), drawn.left + (b + 0.5) * size, drawn.top + (a + 0.5) * size);
      }
  }

  // A frame around the cell, and both names over those of the axes.
  function drawPair(pen, size, margin, flat) {
    const [a, b] = pair, { left, top, side } = drawn;
    const x = left + b * size, y = top + a * size;
    pen.lineWidth = 4;
    pen.strokeStyle = "#ffffff";
    pen.strokeRect(x - 1, y - 1, size + 2, size + 2);
    pen.lineWidth = 2;
    pen.strokeStyle = INK;
    pen.strokeRect(x - 1, y - 1, size + 2, size + 2);
    pen.font = `bold 12px ${FONT}`;
    pen.textBaseline = "middle";
    const tag = (text, middle) => {
      const label = shortened(pen, text, margin - 10), wide = pen.measureText(label).width + 6;
      const start = middle ? -wide / 2 : 3 - wide;
      pen.fillStyle = INK;
      pen.fillRect(start, -9, wide, 18);
      pen.fillStyle = "#ffffff";
      pen.textAlign = "left";
      pen.fillText(label, start + 3, 0.5);
    };
    const inside = (at, low) => Math.min(Math.max(at + size / 2, low + 9), low + side - 9);
    pen.save();
    pen.translate(left - 6, inside(y, top));
    tag(matrix().names[a]);
    pen.restore();
    below(pen, inside(x, left), top + side, flat, () => tag(matrix().names[b], flat));
  }

  function drawBar(pen, y, limit) {
    const { left, side } = drawn;
    pen.imageSmoothingEnabled = true;
    pen.drawImage(bar, left, y, side, 12);
    pen.strokeStyle = SOFT;
    pen.lineWidth = 0.5;
    pen.strokeRect(left, y, side, 12);
    pen.font = `11px ${FONT}`;
    pen.fillStyle = INK;
    pen.textBaseline = "top";
    for (const part of [-1, -0.5, 0, 0.5, 1]) {
      pen.textAlign = part === -1 ? "left" : part === 1 ? "right" : "center";
      pen.fillText(number(part * limit, digits(limit)), left + ((part + 1) / 2) * side, y + 17);
    }
    pen.fillStyle = SOFT;
    const write = (text, align, x) => {
      pen.textAlign = align;
      pen.fillText(text, x, y + 33);
    };
    write(side > 260 ? "← harm each other" : "← harm", "left", left);
    write(side > 260 ? "help each other →" : "help →", "right", left + side);
    if (picture().incomplete) write("grey: no pairs", "center", left + side / 2);
  }

  // The pair's stiffness over the iterations, ± one standard error.
  function drawTrace() {
    const width = trace.parentElement.clientWidth, steps = data.iteration.length;
    trace.hidden = !pair || steps < 2;
    if (trace.hidden || !width) return;
    const wide = Math.min(width, 272), height = 120, limit = matrix().limits[chosen.measure];
    const pen = prepare(trace, wide, height);
    const x = (k) => 42 + (k / (steps - 1)) * (wide - 56);
    const y = (value) => 8 + ((limit - value) / (2 * limit)) * (height - 32);
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, wide, height);
    pen.font = `11px ${FONT}`;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const value of [-limit, 0, limit]) {
      pen.strokeStyle = value ? "#e4e8ec" : SOFT;
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(38, y(value));
      pen.lineTo(wide, y(value));
      pen.stroke();
      pen.fillStyle = INK;
      pen.fillText(number(value, digits(limit)), 34, y(value));
    }
    const found = data.iteration.map((_, k) => cell(...pair, chosen.measure, k));
    pen.strokeStyle = pen.fillStyle = "#0068a5";
    pen.lineWidth = 1.6;
    pen.beginPath();
    found.forEach(({ mean }, k) => Number.isFinite(mean) && pen.lineTo(x(k), y(mean)));
    pen.stroke();
    found.forEach(({ mean, error }, k) => {
      if (!Number.isFinite(mean)) return;
      pen.beginPath();
      if (Number.isFinite(error)) {
        pen.moveTo(x(k), y(mean - error));
        pen.lineTo(x(k), y(mean + error));
        pen.stroke();
      }
      pen.beginPath();
      pen.arc(x(k), y(mean), k === chosen.iteration ? 4.5 : 2.5, 0, 2 * Math.PI);
      pen.fill();
    });
    pen.fillStyle = SOFT;
    pen.textBaseline = "bottom";
    pen.textAlign = "left";
    pen.fillText(`step ${data.iterations[0]}`, 38, height - 3);
    pen.textAlign = "right";
    pen.fillText(data.iterations[steps - 1], wide - 4, height - 3);
  }

  // ---- the page follows what is chosen -------------------------------------------------------

  function show() {
    const said = data.checkpoints[checkpoint()];
    const seed = data.several_seeds ? [`seed: ${data.seeds[chosen.seed]}`] : [];
    element("checkpoint").textContent = said.title;
    element("checkpoint-means").textContent = [said[chosen.measure], said.exact, ...seed].filter(Boolean).join("; ");
    const label = [matrix().title, data.meaning[chosen.measure], said.title].filter(Boolean).join(", ");
    canvas.setAttribute("aria-label", label);
    for (const dim of dims) {
      const text = data[`${dim}s`][chosen[dim]];
      element(`chosen-${dim}`).textContent = text;
      element(`choose-${dim}`).setAttribute("aria-valuetext", text);
    }
    draw();
    showPair();
    if (element("matrix-details").open) fillTable();
  }

  function showPair() {
    element("pair").textContent = pair ? sentence(pair) : "No cell is pointed at.";
    element("trace-note").textContent =
      pair && data.iteration.length > 1
        ? `Its ${chosen.measure} stiffness, step by step (evenly spaced), ± one standard error over examples.`
        : "";
    drawTrace();
  }

  function point(at) {
    if (at?.join() === pair?.join()) return;
    pair = at;
    draw();
    showPair();
  }

  function fillTable() {
    const { names } = matrix(), table = element("matrix");
    const make = (tag, text, scope) => {
      const made = document.createElement(tag);
      made.textContent = text;
      if (scope) made.scope = scope;
      return made;
    };
    const head = document.createElement("thead"), body = document.createElement("tbody");
    head.insertRow().append(make("th", ""), ...names.map((text) => make("th", text, "col")));
    names.forEach((text, a) => {
      const cells = names.map((_, b) => make("td", measured(cell(a, b))));
      body.insertRow().append(make("th", text, "row"), ...cells);
    });
    table.replaceChildren(head, body);
  }

  copies.matrix = () => {
    const { names, dim } = matrix(), rows = [];
    const known = (value) => (Number.isFinite(value) ? value : null);
    const where = dims.map((d) => data[d][chosen[d]]);
    names.forEach((first, a) =>
      names.forEach((second, b) => {
        const found = ["sign", "cosine"].map((measure) => cell(a, b, measure));
        rows.push([...where, first, second, ...found.flatMap(({ mean, error, seedError, pairs }) =>
          [mean, error, seedError, pairs].map(known))]);
      }),
    );
    const ends = ["", "_error", "_seed_error", "_pairs"];
    return csv([...dims, dim, `other_${dim}`, ...["sign", "cosine"].flatMap((m) => ends.map((end) => m + end))], rows);
  };

  // ---- what people do ------------------------------------------------------------------------

  function under(event) {
    const box = canvas.getBoundingClientRect(), scale = drawn.side / matrix().names.length;
    const ratio = canvas.width / (window.devicePixelRatio || 1) / box.width;
    const b = Math.floor(((event.clientX - box.left) * ratio - drawn.left) / scale);
    const a = Math.floor(((event.clientY - box.top) * ratio - drawn.top) / scale);
    const n = matrix().names.length;
    return a >= 0 && b >= 0 && a < n && b < n ? [a, b] : null;
  }

  for (const type of ["pointermove", "pointerdown"])
    canvas.addEventListener(type, (event) => {
      const at = under(event);
      if (at) point(at);
    });
  canvas.addEventListener("focus", () => pair ?? point([0, 0]));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const last = matrix().names.length - 1;
    point((pair ?? [0, 0]).map((at, k) => Math.min(Math.max(at + step[k], 0), last)));
  });

  function radios(id, options, pick) {
    const group = element(id);
    group.hidden = options.length < 2;
    options.forEach(([value, text], k) => {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name: id, value, checked: k === 0 });
      input.addEventListener("change", () => pick(value));
      label.append(input, ` ${text}`);
      group.append(label);
    });
  }

  radios("choose-matrix", data.matrices.map(({ title }, k) => [k, title]), (k) => {
    chosen.matrix = k;
    pair = null;
    show();
  });
  radios("choose-measure", [["sign", "sign"], ["cosine", "cosine"]], (measure) => {
    chosen.measure = measure;
    show();
  });
  for (const dim of dims) {
    const slider = element(`choose-${dim}`);
    slider.max = data[dim].length - 1;
    slider.value = chosen[dim];
    slider.hidden = data[dim].length < 2;
    slider.parentElement.hidden = !data[`${dim}s`].some(Boolean); // it was not given
    slider.addEventListener("input", () => {
      chosen[dim] = Number(slider.value);
      show();
    });
  }
  element("matrix-details").addEventListener("toggle", show);
  element("explorer").hidden = false;
  new ResizeObserver(() => (draw(), drawTrace())).observe(canvas.parentElement);
  show();
}
