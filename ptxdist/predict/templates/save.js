// Saves what is shown: the mask and the overlay are made in the browser, the DICOM SEG by the server.
"use strict";

function save(blob, ending) {
  const link = document.createElement("a"), url = URL.createObjectURL(blob);
  link.href = url;
  link.download = `${files[current].name.replace(/\.(dcm|dicom|png)$/i, "")}-${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  say(`Saved: ${ending}.`);
}

// A PNG of one byte for each pixel, as `ptxdist predict` writes masks; a canvas can write only colours.
async function greyPng(pixels, width, height) {
  const lines = new Uint8Array(height * (width + 1));  // each starts with 0: no filter
  for (let row = 0; row < height; row++) lines.set(pixels.subarray(row * width, (row + 1) * width), row * (width + 1) + 1);
  const packed = new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate"));
  const head = new DataView(new ArrayBuffer(13));
  head.setUint32(0, width); head.setUint32(4, height); head.setUint8(8, 8);
  const parts = [new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10])];
  for (const [name, content] of [["IHDR", head.buffer], ["IDAT", await new Response(packed).arrayBuffer()], ["IEND", new ArrayBuffer(0)]]) {
    const chunk = new Uint8Array(4 + content.byteLength);
    chunk.set([...name].map(letter => letter.charCodeAt(0)));
    chunk.set(new Uint8Array(content), 4);
    const length = new DataView(new ArrayBuffer(4)), sum = new DataView(new ArrayBuffer(4));
    length.setUint32(0, content.byteLength); sum.setUint32(0, checksum(chunk));
    parts.push(length.buffer, chunk, sum.buffer);
  }
  return new Blob(parts, {type: "image/png"});
}

function checksum(bytes) {  // CRC-32, as in PNG
  let sum = 0xffffffff;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = sum & 1 ? sum >>> 1 ^ 0xedb88320 : sum >>> 1;
  }
  return ~sum >>> 0;
}

async function saveMask() {
  const {levels, answer: {rows, columns}} = shown, {area, bottom} = chosen();
  save(await greyPng(levels.map(level => area && level > bottom ? 255 : 0), columns, rows), "mask.png");
}

// The whole picture with what is drawn on it, and a line that says what it is.
async function saveOverlay() {
  const {answer, thresholds} = shown, {area, bottom} = chosen(), line = Math.max(18, Math.round(toned.width / 45));
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  canvas.width = toned.width; canvas.height = toned.height + 2 * line;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(toned, 0, 0);
  const style = getComputedStyle($("mask").lastElementChild), thick = Math.max(1, toned.width / 500);
  context.fillStyle = "#fff";
  context.font = `${line}px sans-serif`;
  const words = `${files[current].synthetic ? "Synthetic. " : ""}Research use only. ${document.body.dataset.models}, threshold ${thresholds[bottom].toFixed(3)}, ` +
    (area ? `${number(area)} pixels` : "not marked");
  context.fillText(words, line / 2, toned.height + 1.35 * line, canvas.width - line);
  context.scale(toned.width / answer.columns, toned.height / answer.rows);
  const path = new Path2D($("mask").lastElementChild.getAttribute("d"));
  context.fillStyle = context.strokeStyle = style.getPropertyValue("--prediction").trim();
  context.globalAlpha = $("opacity").value / 100;
  context.fill(path);
  context.globalAlpha = 1;
  context.lineWidth = thick * answer.columns / toned.width;
  if ($("outlined").checked) context.stroke(path);
  save(await new Promise(done => canvas.toBlob(done, "image/png")), "overlay.png");
}

async function saveSeg() {
  $("seg-note").textContent = "Making the DICOM SEG …";
  try {
    const response = await post("/api/seg", files[current].file);
    save(await response.blob(), "seg.dcm");
    explainSeg();
  } catch (error) {
    $("seg-note").textContent = error.message;
    say(error.message);
  }
}

// The DICOM SEG is the model's own mask: it says that it was made without a person.
function explainSeg() {
  const {own, area} = chosen(), missing = $("seg-note").dataset.missing;
  const reason = missing ? `DICOM SEG needs an extra where the server runs: ${missing}` :
    shown.png ? "A PNG has no study that a DICOM SEG could refer to." :
    !own || !$("smallest").checked ? "DICOM SEG has the mask at the operating point; reset to it." :
    !area ? "Without a mask there is no DICOM SEG." : "";
  $("save-seg").disabled = Boolean(reason);
  $("seg-note").textContent = reason || "A DICOM SEG contains the patient's name and number, as its radiograph does.";
}

$("save-mask").addEventListener("click", saveMask);
$("save-overlay").addEventListener("click", saveOverlay);
$("save-seg").addEventListener("click", saveSeg);
