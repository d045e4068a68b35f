-- Find which of some nodes have, or are getting, some snapshots, and how many ops each node runs.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1]  milliseconds for which it is believed that a node has a snapshot
-- ARGV[2]  milliseconds for which it is believed that one is arriving
-- ARGV[3]  number of nodes, > 0
-- ARGV[4…] nodes, then chain IDs
-- return   {ops of each node…}, then for each chain {nodes that have it…}, {nodes that are getting it…}, where a node
--          is its place among those asked for, from 0
-- include: whereabouts
local prefix, now, count = KEYS[1], tonumber(now_ms_exact()), tonumber(ARGV[3])
local nodes, running = {}, {}
for i = 1, count do
  nodes[i] = ARGV[3 + i]
  running[i] = redis.call('ZCOUNT', ops_key(prefix, nodes[i]), '(' .. now_ms_exact(), '+inf')
end
local since = redis.call('ZMSCORE', noted_key(prefix), unpack(nodes))

local function believed(key, ttl_ms)
  local found = {}
  for i, noted in ipairs(redis.call('ZMSCORE', key, unpack(nodes))) do
    if noted and tonumber(noted) > now - ttl_ms and tonumber(noted) >= tonumber(since[i] or 0) then
      found[#found + 1] = i - 1
    end
  end
  return found
end

local answer = {running}
for i = 4 + count, #ARGV do
  answer[#answer + 1] = believed(here_key(prefix, ARGV[i]), tonumber(ARGV[1]))
  answer[#answer + 1] = believed(arriving_key(prefix, ARGV[i]), tonumber(ARGV[2]))
end
return answer
