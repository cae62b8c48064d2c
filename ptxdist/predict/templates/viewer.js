// The viewer's page: sends files one after the other, and applies the threshold without another request.
// A pixel of level n reaches the first n thresholds (predict/viewer.py), so it is in the mask at threshold i if n > i.
"use strict";

const maxBytes = Number(document.body.dataset.maxBytes);
const MOST_KEPT = 512 * 2 ** 20;  // bytes of pictures and levels; a file whose own are dropped is sent again
const TRIES = 3;
const files = [];  // {file, name, synthetic, state: "waiting", "working", "done" or "refused", reason, again, answer, maps}
let current = -1;
let shown = null;  // of the current file: answer, thresholds, levels, how many pixels reach each threshold, grey levels
let sending = false;
let focusing = null;  // the file whose result gets the focus when it is there
const stale = new Set();  // what the next frame has to draw: "tone", "mask", "view"
let speaking = 0;
const number = value => value.toLocaleString("en");
const isFlagged = ({area_px, score, operating_point: point}) => !area_px && point.image > 0 && score >= point.image;

function add(chosen, synthetic = false) {
  const first = files.length;
  for (const file of chosen) files.push({file, name: file.name, synthetic, state: "waiting"});
  if (files.length === first) return;
  focusing = files[first];
  $("try").hidden = true;
  go(first);
}

function turn(by) { if (files[current + by]) go(current + by); }

function go(index) {
  current = index;
  const item = files[current];
  if (item.state === "refused" && item.again || item.state === "done" && !item.maps) item.state = "waiting";
  display();
  sendAll();
}

async function sendAll() {
  if (sending) return;
  sending = true;
  let item;
  while ((item = files[current].state === "waiting" ? files[current] : files.find(other => other.state === "waiting"))) {
    item.state = "working";
    item.reason = "";
    if (item === files[current]) display(); else list();
    try {
      await predict(item);
      item.state = "done";
    } catch (error) {
      Object.assign(item, {state: "refused", reason: error.message, again: error.again});
    }
    forget();
    if (item === files[current]) display(); else list();
  }
  sending = false;
}

async function predict(item) {
  if (!item.file.size) throw new Error("This file is empty (0 bytes).");
  if (item.file.size > maxBytes) throw new Error(`This file has more than the ${number(maxBytes)} bytes that are accepted.`);
  const parts = await (await post("/api/maps", item.file)).formData();
  const levels = new Uint8Array(await parts.get("levels").arrayBuffer());
  const reach = new Float64Array(256);
  for (let i = 0; i < levels.length; i++) reach[levels[i]]++;
  for (let level = 254; level >= 0; level--) reach[level] += reach[level + 1];
  const grey = new Uint8Array(await parts.get("picture").arrayBuffer()), [height, width] = JSON.parse(parts.get("shape"));
  item.answer = JSON.parse(parts.get("answer"));
  const png = (await item.file.slice(0, 4).text()).endsWith("PNG");
  item.maps = {answer: item.answer, png, thresholds: JSON.parse(parts.get("thresholds")), levels, reach, grey, width, height};
}

// The server's answer to a file; Error with its sentence, `again` if another time may be better.
async function post(address, file) {
  for (let left = TRIES; ; left--) {
    const headers = {"Content-Type": "application/octet-stream"};
    const response = await fetch(address, {method: "POST", headers, body: file}).catch(() => null);
    if (response && response.ok) return response;
    const wait = response && response.headers.get("retry-after");
    const words = !response ? "The server does not answer. Check that `ptxdist serve` is running, and that this is a file that still exists, not a folder." :
      (await response.json().catch(() => ({}))).error || `The server answered with status ${response.status}.`;
    if (!wait || !left) throw Object.assign(new Error(words), {again: !response || response.status !== 422});
    $("working-words").textContent = words;
    await new Promise(done => setTimeout(done, 1000 * wait));
  }
}

// Drop the pictures of the files farthest from the current one, if there are too many bytes of them.
function forget() {
  const near = files.filter(item => item.maps).sort((a, b) => Math.abs(files.indexOf(a) - current) - Math.abs(files.indexOf(b) - current));
  let bytes = 0;
  for (const item of near) {
    bytes += item.maps.levels.length + item.maps.grey.length;
    if (bytes > MOST_KEPT && item !== near[0]) item.maps = null;
  }
}

function display() {
  const item = files[current], waits = item.state === "waiting" || item.state === "working";
  const held = $("result").contains(document.activeElement) ? document.activeElement : null;
  shown = item.state === "done" ? item.maps : null;
  list();
  $("working").hidden = !waits;
  $("working-words").textContent = `Predicting ${item.name} …`;
  $("result").hidden = !shown;
  $("problem").hidden = item.state !== "refused";
  $("problem").textContent = item.state === "refused" ? `${item.name} was not predicted. ${item.reason}` : "";
  if (waits) say(`Predicting ${item.name} …`);
  else if (!shown) say("", 0);  // the alert speaks
  else present(item);
  if (waits) { if (held) focusing = item; return; }
  if (focusing === item) { $(shown ? "result" : "file").focus(); focusing = null; }
}

function list() {
  const counts = [
    ["marked", item => item.answer?.area_px > 0], ["flagged without a mask", item => item.answer && isFlagged(item.answer)],
    ["not marked", item => item.answer?.area_px === 0 && !isFlagged(item.answer)], ["refused", item => item.state === "refused"],
    ["waiting", item => !item.answer && item.state !== "refused"],
  ].map(([words, has]) => [files.filter(has).length, words]).filter(([count]) => count);
  $("files").hidden = files.length < 2;
  $("drop").classList.add("compact");
  const edge = {previous: current <= 0, next: current >= files.length - 1};
  for (const id in edge) {
    if (edge[id] && document.activeElement === $(id)) $(id === "next" ? "previous" : "next").focus();
    $(id).disabled = edge[id];
  }
  $("place").textContent = `${current + 1} of ${files.length}`;
  $("listing-words").textContent = `All ${files.length} files: ` + counts.map(part => part.join(" ")).join(", ");
  for (let index = $("list").children.length; index < files.length; index++) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = files[index].name;
    button.addEventListener("click", () => go(index));
    $("list").appendChild(document.createElement("li")).append(button, document.createElement("span"));
  }
  files.forEach((item, index) => {
    const {answer, state} = item;
    const said = state === "refused" ? "refused" : !answer ? (state === "working" ? "in work" : "waiting") :
      `${answer.area_px ? `marked, ${number(answer.area_px)} pixels` : isFlagged(answer) ? "flagged without a mask" : "not marked"}, score ${answer.score.toFixed(3)}`;
    if (item.listed === said + (index === current)) return;  // of thousands of files, few rows change
    item.listed = said + (index === current);
    const [button, words] = $("list").children[index].children;
    words.textContent = said;
    if (index === current) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
  });
}

// Says it in the status line of screen readers; a slider that moves says only where it stops.
function say(words, after = 400) {
  clearTimeout(speaking);
  if (after) speaking = setTimeout(() => { $("said").textContent = words; }, after);
  else $("said").textContent = words;
}

function present(item) {
  const {answer, thresholds, width, height} = shown, {rows, columns, operating_point: point} = answer;
  $("result-title").textContent = `Result for ${item.name}`;
  $("synthetic").hidden = !item.synthetic;
  $("frame").style.aspectRatio = `${columns} / ${rows}`;
  $("geometry").textContent = `${number(columns)} × ${number(rows)} pixels` + (width < columns ? `, shown from ${number(width)} × ${number(height)}` : "") + ", 8 bits of grey.";
  $("score").textContent = answer.score.toFixed(3);
  $("calibrated").textContent = answer.calibrated == null ? "" :
    `As a probability, calibrated on the images of the model's evaluation: ${answer.calibrated.toFixed(3)}.`;
  const cautions = answer.cautions.filter(words => words !== $("caution").textContent);  // it is at the top of the page
  $("cautions").replaceChildren(...cautions.map(words => Object.assign(document.createElement("li"), {textContent: words})));
  $("threshold").max = thresholds.length - 1;
  $("threshold").value = thresholds.indexOf(point.bottom);
  $("point").textContent = `The model's operating point: ${answer.rule}.`;
  $("smallest-label").hidden = !point.min_area_px && !point.image;
  $("smallest").checked = true;
  $("smallest-words").textContent = "no mask " + [
    ...(point.image ? [`for a score below ${point.image}`] : []),
    ...(point.min_area_px ? [`of fewer than ${number(point.min_area_px)} pixels`] : []),
  ].join(", and none ");
  view.zoom = 1;
  for (const part of ["tone", "mask", "view"]) stale.add(part);
  drawStale();
}

// Away from the operating point one threshold is used for both, as with `ptxdist predict --threshold`.
function chosen() {
  const {thresholds, reach, answer: {score, operating_point: point}} = shown;
  const bottom = Number($("threshold").value), own = bottom === thresholds.indexOf(point.bottom);
  const top = own ? thresholds.indexOf(point.top) : bottom, limited = $("smallest").checked;
  const enough = reach[top + 1], all = reach[bottom + 1];
  const reason = limited && score < (point.image || 0) ? `its score ${score.toFixed(3)} is below ${point.image}` :
    limited && enough < point.min_area_px ? `only ${number(enough)} pixels reach ${digits(thresholds[top])}; a mask needs ${number(point.min_area_px)}` :
    all ? "" : `no pixel reaches ${digits(thresholds[bottom])}`;
  return {bottom, own: own && limited, reason, area: reason ? 0 : all};
}

const digits = value => String(Number(value.toFixed(3)));

function draw() {
  const {answer, thresholds} = shown, {bottom, own, reason, area} = chosen();
  const path = area ? outline(bottom) : "", share = `${(100 * area / (answer.rows * answer.columns)).toFixed(2)} % of the image`;
  for (const element of $("mask").children) element.setAttribute("d", path);
  $("mask").lastElementChild.style.fillOpacity = $("opacity").value / 100;
  $("mask").classList.toggle("plain", !$("outlined").checked);
  $("threshold-value").textContent = thresholds[bottom].toFixed(3);
  $("threshold").setAttribute("aria-valuetext", thresholds[bottom].toFixed(3));
  $("opacity-value").textContent = `${$("opacity").value} %`;
  $("opacity").setAttribute("aria-valuetext", `${$("opacity").value} %`);
  $("reset").disabled = own;
  const where = own ? "" : " This is not the model's operating point.";
  const place = own && answer.side ? `; ${answer.side}, ${answer.zone} zone` : "";
  const why = reason.replace("only 0 pixels reach", "no pixel reaches");
  const verdict = area ? `marked: ${number(area)} pixels, ${share}${place}.` :
    own && isFlagged(answer) ? `flagged by the score, but ${why}. That is no negative answer: look at the whole image.` : `not marked, because ${why}.`;
  $("verdict").textContent = `${document.body.dataset.finding} ${verdict}${where}`;
  $("area").textContent = number(area);
  const plane = answer.mm2_plane === "detector" ? " on the detector, where anatomy is slightly magnified" : "";
  $("area-more").textContent = answer.px_mm2 === null ? `No mm²: ${answer.mm2_reason}.` : `${number(Math.round(area * answer.px_mm2))} mm²${plane}.`;
  explainSeg();
  const words = `${$("verdict").textContent} Score ${answer.score.toFixed(3)}, threshold ${thresholds[bottom].toFixed(3)}.`;
  $("radiograph").setAttribute("aria-label", `${files[current].synthetic ? "Drawing of a chest" : "Chest"} radiograph. ${words}`);
  say(words);
}

function redraw(part) {
  if (!shown) return;
  if (!stale.size) requestAnimationFrame(() => { if (shown) drawStale(); });
  stale.add(part);
}

function drawStale() {
  if (stale.has("tone")) tone(shown);
  if (stale.has("mask")) draw();
  if (stale.has("tone") || stale.has("view")) paint(shown);
  stale.clear();
}

for (const id of ["threshold", "opacity", "outlined", "smallest"]) $(id).addEventListener("input", () => redraw("mask"));
$("reset").addEventListener("click", () => {
  $("threshold").value = shown.thresholds.indexOf(shown.answer.operating_point.bottom);
  $("smallest").checked = true;
  $("threshold").focus();  // the button is about to be disabled
  redraw("mask");
});
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
$("file").addEventListener("change", () => {
  add([...$("file").files]);
  $("file").value = "";  // so that the same file can be chosen again
});
$("example").addEventListener("click", async () => {
  const response = await fetch("/example.dcm").catch(() => null);
  if (response && response.ok) add([new File([await response.blob()], "synthetic example.dcm")], true);
});
new ResizeObserver(() => redraw("view")).observe($("frame"));
let over = 0;
addEventListener("dragenter", () => { over++; $("drop").classList.add("over"); });
addEventListener("dragleave", () => { if (!--over) $("drop").classList.remove("over"); });
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  event.preventDefault();
  over = 0;
  $("drop").classList.remove("over");
  add([...event.dataTransfer.files]);
});
