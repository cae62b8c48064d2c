// The picture: zoom and place, window and level, and the outline of the mask. Points are in pixels of the file.
"use strict";

const $ = id => document.getElementById(id);
const MOST_ZOOM = 16;
const view = {zoom: 1, x: 0, y: 0};  // x, y: the point in the middle of the frame
const hands = new Map();  // pointers that hold the frame: last place in the window, and the button
const toned = document.createElement("canvas");  // the picture with window, level and inversion

// Window and level as in DICOM PS3.3 C.11.2.1.2; 256 and 128 change nothing.
function tone({grey, width, height}) {
  const span = Number($("window").value), middle = Number($("level").value), inverted = $("inverted").checked;
  const table = new Uint8ClampedArray(256).map((_, value) => ((value - middle + .5) / (span - 1) + .5) * 255);
  toned.width = width; toned.height = height;
  const context = toned.getContext("2d"), image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer), colours = new Uint32Array(256);
  for (let value = 0; value < 256; value++) {
    const shade = inverted ? 255 - table[value] : table[value];
    colours[value] = 0xff000000 | shade << 16 | shade << 8 | shade;
  }
  for (let i = 0; i < grey.length; i++) pixels[i] = colours[grey[i]];
  context.putImageData(image, 0, 0);
  for (const id of ["window", "level"]) $(`${id}-value`).textContent = $(id).value;
  $("all-greys").disabled = span === 256 && middle === 128 && !inverted;
}

// Pixels of the screen for one of the file.
function scale({answer: {rows, columns}}) {
  const {clientWidth: width, clientHeight: height} = $("frame");
  return view.zoom * Math.min(width / columns, height / rows);
}

function paint(shown) {
  const {answer: {rows, columns}} = shown, {clientWidth: width, clientHeight: height} = $("frame");
  const factor = scale(shown), ratio = devicePixelRatio;
  const within = (value, length, room) => room >= length ? length / 2 : Math.min(Math.max(value, room / 2), length - room / 2);
  view.x = within(view.x, columns, width / factor);
  view.y = within(view.y, rows, height / factor);
  const canvas = $("radiograph"), context = canvas.getContext("2d");
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  const left = view.x - width / factor / 2, top = view.y - height / factor / 2;
  context.setTransform(factor * ratio, 0, 0, factor * ratio, -left * factor * ratio, -top * factor * ratio);
  context.imageSmoothingEnabled = factor * ratio < 4;  // above it, the pixels are what one wants to see
  context.imageSmoothingQuality = "high";
  context.drawImage(toned, 0, 0, columns, rows);
  $("mask").setAttribute("viewBox", `${left} ${top} ${width / factor} ${height / factor}`);
  $("zoom").textContent = `${view.zoom.toFixed(1)} ×`;
  $("frame").classList.toggle("near", view.zoom > 1);
  $("closer").disabled = view.zoom >= MOST_ZOOM;
  $("farther").disabled = $("fit").disabled = view.zoom <= 1;
}

// Zoom by a factor; the point at (x, y), in pixels of the frame from its middle, stays where it is.
function zoomBy(factor, x = 0, y = 0) {
  if (!shown) return;
  const before = scale(shown);
  view.zoom = Math.min(Math.max(view.zoom * factor, 1), MOST_ZOOM);
  const after = scale(shown);
  move(x / after - x / before, y / after - y / before);
}

function move(x, y) { view.x -= x; view.y -= y; redraw("view"); }

function fit() { view.zoom = 1; redraw("view"); }

function changeGreys(span, middle) {
  $("window").value = Number($("window").value) + span;
  $("level").value = Number($("level").value) + middle;
  redraw("tone");
}

function allGreys() {
  $("window").value = 256; $("level").value = 128; $("inverted").checked = false;
  redraw("tone");
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

function fromMiddle(x, y) {
  const {left, top, width, height} = $("frame").getBoundingClientRect();
  return [x - left - width / 2, y - top - height / 2];
}

$("frame").addEventListener("wheel", event => {
  if (event.deltaY > 0 && view.zoom <= 1) return;  // then the page is scrolled
  event.preventDefault();
  zoomBy(2 ** (-event.deltaY * (event.deltaMode ? 20 : 1) / 300), ...fromMiddle(event.clientX, event.clientY));
}, {passive: false});
$("frame").addEventListener("dblclick", event => view.zoom > 1 ? fit() : zoomBy(3, ...fromMiddle(event.clientX, event.clientY)));
$("frame").addEventListener("contextmenu", event => event.preventDefault());
$("frame").addEventListener("pointerdown", event => {
  $("frame").setPointerCapture(event.pointerId);
  hands.set(event.pointerId, {place: [event.clientX, event.clientY], button: event.button});
});
$("frame").addEventListener("pointermove", event => {
  const hand = hands.get(event.pointerId);
  if (!hand || !shown) return;
  const {clientX: x, clientY: y} = event, dx = x - hand.place[0], dy = y - hand.place[1];
  if (hands.size === 2) {
    const other = [...hands].find(([id]) => id !== event.pointerId)[1].place;
    const before = Math.hypot(hand.place[0] - other[0], hand.place[1] - other[1]), after = Math.hypot(x - other[0], y - other[1]);
    if (before) zoomBy(after / before, ...fromMiddle((x + other[0]) / 2, (y + other[1]) / 2));
  } else if (hand.button === 2) {
    changeGreys(Math.round(dx), Math.round(dy));
  } else {
    move(dx / scale(shown), dy / scale(shown));
  }
  hand.place = [x, y];
});
for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) $("frame").addEventListener(name, event => hands.delete(event.pointerId));
$("frame").addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !shown) return;
  const step = $("frame").clientWidth / 10 / scale(shown);
  const does = {
    "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(.8), "0": fit, i: () => $("inverted").click(),
    ArrowLeft: () => move(step, 0), ArrowRight: () => move(-step, 0), ArrowUp: () => move(0, step), ArrowDown: () => move(0, -step),
    n: () => turn(1), p: () => turn(-1),
  }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (does) { event.preventDefault(); does(); }
});
$("closer").addEventListener("click", () => zoomBy(1.25));
$("farther").addEventListener("click", () => zoomBy(.8));
$("fit").addEventListener("click", fit);
$("all-greys").addEventListener("click", allGreys);
for (const id of ["window", "level", "inverted"]) $(id).addEventListener("input", () => redraw("tone"));
