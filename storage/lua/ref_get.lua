-- Read refs with the facts around them.
--
-- KEYS[1]  prefix of the farm's keys
-- ARGV[1…] ref IDs
-- return   for each: {record, blob record or nil, providers}, or nil where there is none
-- include: ref
local states = {}
for i = 1, #ARGV do
  local value = redis.call('GET', KEYS[1] .. ':ref:' .. ARGV[i])
  states[i] = value and ref_state(KEYS[1], value)
end
return states
