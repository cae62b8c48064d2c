// The viewer's page: sends a file, draws the mask, and applies the threshold without another request.
// A pixel of level n reaches the first n thresholds (predict/viewer.py), so it is in the mask at threshold i if n > i.
"use strict";

const $ = id => document.getElementById(id);
const maxBytes = Number(document.body.dataset.maxBytes);
let shown = null;  // answer, thresholds, levels, and how many pixels reach each threshold
let sending = false;
let waiting = false;  // for the next frame
let speaking = 0;
const number = value => value.toLocaleString("en");

async function send(file) {
  if (sending) return;
  problem("");
  try {
    if (!file.size) throw new Error("This file is empty (0 bytes).");
    if (file.size > maxBytes) throw new Error(`This file has more than the ${number(maxBytes)} bytes that are accepted.`);
    work("Predicting …");
    const headers = {"Content-Type": "application/dicom"};
    const response = await fetch("/api/maps", {method: "POST", headers, body: file}).catch(() => null);
    if (!response) throw new Error("The server does not answer. Check that `ptxdist serve` is running and that the file still exists.");
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error || `The server answered with status ${response.status}.`);
    await show(await response.formData());
  } catch (error) {
    problem(error.message);
  }
  work("");
  $("file").value = "";  // so that the same file can be chosen again
  $(shown ? "result" : "file").focus();
}

function work(words) {
  sending = Boolean(words);
  $("working").hidden = !sending;
  $("working-words").textContent = words;
  $("file").disabled = sending;
  $("result").setAttribute("aria-busy", sending);
  if (sending) { $("result").hidden = true; say(words); }  // no old result beside a new file
}

function problem(words) {
  $("problem").hidden = !words;
  $("problem").textContent = words;
  if (words) { $("result").hidden = true; shown = null; }
}

function say(words) {
  clearTimeout(speaking);
  speaking = setTimeout(() => { $("said").textContent = words; }, 400);
}

async function show(parts) {
  const answer = JSON.parse(parts.get("answer")), thresholds = JSON.parse(parts.get("thresholds"));
  const levels = new Uint8Array(await parts.get("levels").arrayBuffer());
  const reach = new Float64Array(256);
  for (let i = 0; i < levels.length; i++) reach[levels[i]]++;
  for (let level = 254; level >= 0; level--) reach[level] += reach[level + 1];
  shown = {answer, thresholds, levels, reach};
  const {rows, columns, operating_point: point} = answer;
  const url = URL.createObjectURL(parts.get("picture"));
  $("radiograph").src = url;
  await $("radiograph").decode();
  URL.revokeObjectURL(url);
  $("mask").setAttribute("viewBox", `0 0 ${columns} ${rows}`);
  $("geometry").textContent = `${number(columns)} × ${number(rows)} pixels`;
  $("score").textContent = answer.score.toFixed(3);
  $("calibrated").textContent = answer.calibrated == null ? "" :
    `As a probability, calibrated on the images of the model's evaluation: ${answer.calibrated.toFixed(3)}.`;
  $("threshold").max = thresholds.length - 1;
  $("threshold").value = thresholds.indexOf(point.bottom);
  $("point").textContent = `The model's operating point: ${answer.rule}.`;
  $("smallest-label").hidden = !point.min_area_px && !point.image;
  $("smallest").checked = true;
  $("smallest-words").textContent = "no mask " + [
    ...(point.image ? [`for a score below ${point.image}`] : []),
    ...(point.min_area_px ? [`of fewer than ${number(point.min_area_px)} pixels`] : []),
  ].join(", and none ");
  $("result").hidden = false;
  draw();
}

// Away from the operating point one threshold is used for both, as with `ptxdist predict --threshold`.
function chosen() {
  const {thresholds, reach, answer: {score, operating_point: point}} = shown;
  const bottom = Number($("threshold").value), own = bottom === thresholds.indexOf(point.bottom);
  const top = own ? thresholds.indexOf(point.top) : bottom;
  const reason = score < (point.image || 0) ? "the score is too low" : reach[top + 1] < point.min_area_px ? "too few pixels" : "";
  const emptied = $("smallest").checked && reason;
  return {bottom, own, emptied, area: emptied ? 0 : reach[bottom + 1]};
}

function draw() {
  const {answer, thresholds} = shown, {bottom, own, emptied, area} = chosen();
  const path = area ? outline(bottom) : "";
  for (const element of $("mask").children) element.setAttribute("d", path);
  $("mask").lastElementChild.style.fillOpacity = $("opacity").value / 100;
  $("mask").classList.toggle("plain", !$("outlined").checked);
  $("threshold-value").textContent = thresholds[bottom].toFixed(3);
  $("threshold").setAttribute("aria-valuetext", thresholds[bottom].toFixed(3));
  $("opacity-value").textContent = `${$("opacity").value} %`;
  $("opacity").setAttribute("aria-valuetext", `${$("opacity").value} %`);
  $("reset").disabled = own && $("smallest").checked;
  $("area").textContent = number(area);
  const share = `${(100 * area / (answer.rows * answer.columns)).toFixed(2)} % of the image. `;
  const plane = answer.mm2_plane === "detector" ? " on the detector, where anatomy is slightly magnified" : "";
  const size = answer.px_mm2 === null ? `No mm²: ${answer.mm2_reason}.` : `${number(Math.round(area * answer.px_mm2))} mm²${plane}.`;
  $("area-more").textContent = (emptied ? `No mask: ${emptied}. ` : share) + size;
  const words = `Score ${answer.score.toFixed(3)}, threshold ${thresholds[bottom].toFixed(3)}: ` +
    (area ? `mask of ${number(area)} pixels` : "no mask") + (own ? ", at the model's operating point" : "");
  $("radiograph").alt = `Chest radiograph. ${words}`;
  say(words);
}

// The edges of all pixels above a level, as closed paths along pixel sides; holes have the opposite direction.
function outline(level) {
  const {levels, answer: {rows, columns}} = shown;
  const inside = (x, y) => x >= 0 && y >= 0 && x < columns && y < rows && levels[y * columns + x] > level;
  const seen = new Uint8Array(rows * columns);  // pixels whose upper side is part of a path
  const parts = [];
  for (let row = 0; row < rows; row++) {
    for (let column = 0, at = row * columns; column < columns; column++, at++) {
      if (levels[at] <= level || seen[at] || (row && levels[at - columns] > level)) continue;
      let x = column, y = row, dx = 1, dy = 0;
      parts.push(`M${x},${y}`);
      do {  // the mask is on the right
        if (dx === 1) seen[y * columns + x] = 1;
        x += dx; y += dy;
        const right = inside(x + (dx - dy - 1) / 2, y + (dx + dy - 1) / 2), left = inside(x + (dx + dy - 1) / 2, y + (dy - dx - 1) / 2);
        if (right && !left) continue;
        parts.push(dx ? `H${x}` : `V${y}`);
        [dx, dy] = right ? [dy, -dx] : [-dy, dx];
      } while (x !== column || y !== row || dx !== 1);
      parts.push("Z");
    }
  }
  return parts.join("");
}

function redraw() {
  if (!shown || waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; if (shown) draw(); });
}

for (const id of ["threshold", "opacity", "outlined", "smallest"]) $(id).addEventListener("input", redraw);
$("reset").addEventListener("click", () => {
  $("threshold").value = shown.thresholds.indexOf(shown.answer.operating_point.bottom);
  $("smallest").checked = true;
  $("threshold").focus();  // the button is about to be disabled
  redraw();
});
$("file").addEventListener("change", () => { if ($("file").files.length) send($("file").files[0]); });
let over = 0;
addEventListener("dragenter", () => { over++; $("drop").classList.add("over"); });
addEventListener("dragleave", () => { if (!--over) $("drop").classList.remove("over"); });
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  event.preventDefault();
  over = 0;
  $("drop").classList.remove("over");
  const files = event.dataTransfer.files;
  if (files.length > 1) problem("Drop one file at a time.");
  else if (files.length) send(files[0]);
});
