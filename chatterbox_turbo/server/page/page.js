"use strict";

const at = (id) => document.getElementById(id);
const key = at("key");
let context = null; // made by the first click: browsers refuse sound before one
let running = null; // AbortController of the request that is under way
let playing = []; // sources that were scheduled

key.value = sessionStorage.getItem("key") || "";
key.addEventListener("change", () => {
  sessionStorage.setItem("key", key.value);
  listVoices();
});

function headers(more = {}) {
  return key.value ? { Authorization: `Bearer ${key.value}`, ...more } : more;
}

function tell(message, bad = false) {
  at("message").textContent = message;
  at("message").className = bad ? "bad" : "";
}

async function refusal(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

async function listVoices(chosen) {
  const answer = await fetch("v1/audio/voices", { headers: headers() });
  if (!answer.ok) {
    tell(await refusal(answer), true);
    return;
  }
  const select = at("voice");
  const before = chosen || select.value;
  select.replaceChildren(
    ...(await answer.json()).voices.map((voice) => new Option(voice.name, voice.id)),
  );
  if ([...select.options].some((option) => option.value === before)) select.value = before;
  if (at("message").className) tell("");
}

// bytes of 16-bit samples to a sound that begins where the one before ends
class Player {
  constructor(rate) {
    this.rate = rate;
    this.rest = new Uint8Array(0);
    this.next = 0;
    this.parts = [];
    this.count = 0;
  }

  push(bytes) {
    const all = new Uint8Array(this.rest.length + bytes.length);
    all.set(this.rest);
    all.set(bytes, this.rest.length);
    const whole = all.length - (all.length % 2);
    this.rest = all.slice(whole);
    if (!whole) return;
    const view = new DataView(all.buffer, 0, whole);
    const samples = new Float32Array(whole / 2);
    for (let n = 0; n < samples.length; n++) samples[n] = view.getInt16(2 * n, true) / 32768;
    this.parts.push(all.slice(0, whole));
    this.count += samples.length;
    const buffer = context.createBuffer(1, samples.length, this.rate);
    buffer.copyToChannel(samples, 0);
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(context.destination);
    this.next = Math.max(this.next, context.currentTime + 0.05);
    source.start(this.next);
    this.next += buffer.duration;
    playing.push(source);
  }

  get seconds() {
    return this.count / this.rate;
  }

  // a WAV file of all of it, to be heard again
  file() {
    const head = new DataView(new ArrayBuffer(44));
    const word = (offset, text) => [...text].forEach((c, n) => head.setUint8(offset + n, c.charCodeAt(0)));
    const size = 2 * this.count;
    word(0, "RIFF");
    head.setUint32(4, 36 + size, true);
    word(8, "WAVEfmt ");
    head.setUint32(16, 16, true);
    head.setUint16(20, 1, true);
    head.setUint16(22, 1, true);
    head.setUint32(24, this.rate, true);
    head.setUint32(28, 2 * this.rate, true);
    head.setUint16(32, 2, true);
    head.setUint16(34, 16, true);
    word(36, "data");
    head.setUint32(40, size, true);
    return new Blob([head.buffer, ...this.parts], { type: "audio/wav" });
  }
}

function silence() {
  if (running) running.abort();
  running = null;
  for (const source of playing) source.stop();
  playing = [];
  at("go").disabled = false;
  at("stop").disabled = true;
}

async function speak(event) {
  event.preventDefault();
  silence();
  context = context || new AudioContext();
  context.resume();
  const mine = (running = new AbortController());
  at("go").disabled = true;
  at("stop").disabled = false;
  for (const id of ["first", "seconds", "factor"]) at(id).textContent = "–";
  tell("");
  const asked = { input: at("text").value, voice: at("voice").value, response_format: "pcm", stream: true };
  if (at("seed").value) asked.seed = Number(at("seed").value);
  const start = performance.now();
  const since = () => (performance.now() - start) / 1000;
  try {
    const answer = await fetch("v1/audio/speech", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(asked),
      signal: mine.signal,
    });
    if (!answer.ok) throw new Error(await refusal(answer));
    const player = new Player(Number(answer.headers.get("X-Sample-Rate")));
    const reader = answer.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (!player.count) at("first").textContent = `${since().toFixed(2)} s`;
      player.push(value);
      at("seconds").textContent = `${player.seconds.toFixed(2)} s`;
      at("factor").textContent = (since() / player.seconds).toFixed(2);
    }
    URL.revokeObjectURL(at("again").src);
    at("again").src = URL.createObjectURL(player.file());
    at("again").hidden = false;
    tell(`Seed ${answer.headers.get("X-Seed")}.`);
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message, true);
  }
  if (running === mine) {
    running = null;
    at("go").disabled = false;
  }
}

async function upload(event) {
  event.preventDefault();
  const form = new FormData();
  form.append("name", at("name").value);
  form.append("audio_sample", at("file").files[0]);
  tell("Encoding the recording …");
  const answer = await fetch("v1/audio/voices", { method: "POST", headers: headers(), body: form });
  if (!answer.ok) {
    tell(await refusal(answer), true);
    return;
  }
  const { id } = await answer.json();
  await listVoices(id);
  tell(`There is a voice ${id} now.`);
}

at("speak").addEventListener("submit", speak);
at("stop").addEventListener("click", silence);
at("upload").addEventListener("submit", upload);
fetch("health")
  .then((answer) => answer.json())
  .then((about) => (at("model").textContent = `Model: ${about.model}`))
  .catch(() => tell("The server does not answer.", true));
listVoices();
