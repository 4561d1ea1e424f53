// The AI SDK: generateObject, tools, streams, pictures.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "dashinfer",
  baseURL: process.env.DASHINFER_URL + "/v1",
  apiKey: "EMPTY",
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const model = provider("model");
const options = { model, temperature: 0, maxOutputTokens: 1000, maxRetries: 0 };
const Place = z.object({ city: z.enum(["Paris", "Rome"]) });

test("generateObject gives an object", async () => {
  const { object } = await generateObject({
    ...options,
    schema: z.object({ shape: z.enum(["circle", "square"]) }),
    messages: [
      {
        role: "user",
        content: [
          { type: "text", text: "What shape is it?" },
          { type: "image", image: process.env.DASHINFER_PICTURE },
        ],
      },
    ],
  });
  assert.ok(["circle", "square"].includes(object.shape));
});

test("a tool is called with its arguments", async () => {
  const cities = [];
  const weather = tool({
    description: "Of a city.",
    inputSchema: Place,
    execute: ({ city }) => {
      cities.push(city);
      return "sunny";
    },
  });
  const { toolCalls } = await generateText({
    ...options,
    prompt: "How is the weather?",
    tools: { weather },
    toolChoice: "required",
  });
  assert.equal(toolCalls[0].toolName, "weather");
  assert.ok(["Paris", "Rome"].includes(cities[0]));
});

test("text is streamed, and its usage told", async () => {
  const result = streamText({ ...options, prompt: "hi", maxOutputTokens: 8 });
  let text = "";
  for await (const part of result.textStream) text += part;
  assert.ok(text.length > 0);
  assert.ok((await result.usage).outputTokens > 0);
});
