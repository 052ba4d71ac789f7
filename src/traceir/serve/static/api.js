// The server, as the pages see it. Addresses are relative to the page, so that it also works below a path of a proxy.

import { el } from "./dom.js";

const PICTURES_KEPT = 300;
// What an error of a stream, which has no status of its own, would have had.
const STATUS = { invalid_request_error: 400, authentication_error: 401, timeout_error: 408, rate_limit_error: 429 };

// What the server refused. `status` is 0 where it could not be reached.
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    Object.assign(this, { name: "ApiError", status, retryAfter });
  }
}

export const isAbort = (error) => error instanceof DOMException && error.name === "AbortError";

export const key = {
  get: () => sessionStorage.getItem("traceir.key") ?? "",
  set(value = "") {
    sessionStorage.setItem("traceir.key", value);
    forgetPictures();
  },
};

// The address of a path such as "/pictures/Nw"; null for anything that is not a path of this server.
function addressOf(path) {
  if (typeof path !== "string" || !/^\/(?!\/)[^\\]*$/.test(path)) return null;
  const address = new URL(path.slice(1), document.baseURI);
  return address.origin === location.origin ? address.href : null;
}

async function ask(path, { body, signal, accept = "application/json" } = {}) {
  const headers = { accept };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(addressOf(path), { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(navigator.onLine ? "The server cannot be reached. Is it still running?" : "This device is offline.");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null); // a proxy's page, or nothing
  const wait = Number.parseFloat(response.headers.get("retry-after") ?? ""); // NaN without one
  throw new ApiError(messageOf(answer?.error) ?? `The server answered with status ${response.status}.`, response.status, wait || null);
}

const messageOf = (error) => [error?.message, error].find((text) => typeof text === "string" && text);

// The JSON at a path; with a `body` it is posted.
export async function askJson(path, body = null) {
  const response = await ask(path, { body });
  return response.json().catch(() => { throw new ApiError("The server's answer was cut off or is not JSON.", response.status); });
}

// The events of one search: {event: "route" | "reasoning" | "hits", data}. An `error` event is thrown, and so is an early end.
export async function* streamSearch(body, signal) {
  const response = await ask("/search/stream", { body, signal, accept: "text/event-stream" });
  try {
    for await (const { event, data } of readEvents(response.body)) {
      const read = JSON.parse(data);
      if (event === "error") {
        throw new ApiError(messageOf(read?.error) ?? "The server gave no reason.", STATUS[read?.error?.type] ?? 500);
      }
      yield { event, data: read };
      if (event === "hits") return;
    }
  } catch (error) {
    if (isAbort(error) || error instanceof ApiError) throw error;
    if (error instanceof SyntaxError) throw new ApiError("The server sent an event that is not JSON.", response.status);
    throw new ApiError("The connection was lost before the hits came.");
  }
  if (signal?.aborted) throw new DOMException("stopped", "AbortError");
  throw new ApiError("The connection ended before the hits came.");
}

// The server-sent events (HTML standard, 9.2) of a stream of bytes, which is cancelled when the caller stops reading. EventSource can
// neither POST nor send a key. An event that no blank line ended is dropped.
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      const blocks = (rest + read.value).split(/(?:\r\n|\n|\r(?!\n)){2}/); // an \n that comes after its \r leads the next one
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = block.split(/\r\n?|\n/).map((line) => /^([^:]*)(?:: ?(.*))?$/s.exec(line)); // comments, id and retry mean nothing here
        const valuesOf = (name) => fields.filter(([, field]) => field === name).map(([, , value = ""]) => value);
        const data = valuesOf("data");
        if (data.length) yield { event: valuesOf("event").at(-1) || "message", data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const pictures = new Map(); // An <img> sends no key, so with a key pictures are fetched and shown as blobs.
const paths = new Map(); // of the pictures of items that are known by their ids alone

function forgetPictures(count = pictures.size) {
  for (const [path, source] of [...pictures].slice(0, count)) {
    pictures.delete(path);
    source.then((address) => URL.revokeObjectURL(address), () => {});
  }
}

// What to put into `src` for a picture's path. Rejects where it cannot be had.
async function pictureSource(path) {
  if (String(path).startsWith("data:image/")) return path;
  const address = addressOf(path);
  if (address === null) throw new ApiError("This is not a picture of the server.");
  if (!key.get()) return address;
  if (!pictures.has(path)) {
    pictures.set(path, ask(path, { accept: "image/*" }).then((response) => response.blob()).then((blob) => URL.createObjectURL(blob)));
    forgetPictures(pictures.size - PICTURES_KEPT);
  }
  return pictures.get(path);
}

// Shows a picture of the server in an <img>, at least `side` pixels wide if it has them; `onlost` where it cannot be shown.
export function showPicture(img, path, side, onlost) {
  img.addEventListener("error", onlost, { once: true });
  Promise.resolve(path).then((known) => pictureSource(side ? `${known}?side=${side}` : known)).then((source) => { img.src = source; }, onlost);
}

// Shows the picture of a query in an <img>.
export function showQueryPicture(img, { kind, id, path, data }) {
  const known = kind === "file" ? data : path ?? paths.get(id) ?? askJson(`/items/${encodeURIComponent(id)}`).then((item) => item.image);
  if (kind === "item") paths.set(id, known);
  showPicture(img, known, kind === "file" ? null : 256, () => img.classList.add("lost"));
  return img;
}

// A query's picture, small; null where it has none.
export const thumb = (picture, alt = "") => picture && showQueryPicture(el("img", { alt, class: "thumb" }), picture);
