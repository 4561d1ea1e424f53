// openai from npm: parse, stream, runTools.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.DASHINFER_URL + "/v1", apiKey: "EMPTY", maxRetries: 0 });
const Seen = z.object({ shape: z.enum(["circle", "square"]), colour: z.enum(["red", "blue"]) });
const Place = z.object({ city: z.enum(["Paris", "Rome"]) });
const options = { model: "model", temperature: 0, max_tokens: 1000 };
const ask = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: process.env.DASHINFER_PICTURE } },
      { type: "text", text: "What shape is it, and of what colour?" },
    ],
  },
];

test("parse gives an object", async () => {
  const reply = await client.chat.completions.parse({
    ...options,
    messages: ask,
    response_format: zodResponseFormat(Seen, "seen"),
  });
  assert.ok(Seen.parse(reply.choices[0].message.parsed));
});

test("a stream gives the same object at its end", async () => {
  const stream = client.chat.completions.stream({
    ...options,
    messages: ask,
    response_format: zodResponseFormat(Seen, "seen"),
    stream_options: { include_usage: true },
  });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.ok(Seen.parse(JSON.parse(text)));
  assert.equal(final.usage.total_tokens, final.usage.prompt_tokens + final.usage.completion_tokens);
});

test("runTools calls a function and sends its answer back", async () => {
  const cities = [];
  const weather = zodFunction({
    name: "weather",
    parameters: Place,
    function: ({ city }) => {
      cities.push(city);
      return "sunny";
    },
  });
  const runner = client.chat.completions.runTools({
    ...options,
    messages: [{ role: "user", content: "How is the weather?" }],
    tools: [weather],
    tool_choice: { type: "function", function: { name: "weather" } },
  });
  await runner.done();
  assert.ok(["Paris", "Rome"].includes(cities[0]));
});

test("responses: parse gives an object, a stream its events", async () => {
  const reply = await client.responses.parse({
    model: "model",
    input: "What is on it?",
    text: { format: zodTextFormat(Seen, "seen") },
    temperature: 0,
    max_output_tokens: 1000,
  });
  assert.ok(Seen.parse(reply.output_parsed));
  const kinds = new Set();
  for await (const event of await client.responses.create({
    model: "model",
    input: "hi",
    max_output_tokens: 8,
    stream: true,
  })) {
    kinds.add(event.type);
  }
  assert.ok(kinds.has("response.output_text.delta"));
});
