-- Read the flights that are under way, for people.
--
-- KEYS[1] prefix of the farm's keys
-- return  a list of {key, fence, owner, milliseconds left, aborting, current bytes, total bytes, waiters, parts
--         uploaded}
-- include: time
-- include: flight
local prefix, now, found = KEYS[1], now_ms(), {}
for _, key in ipairs(redis.call('SMEMBERS', prefix .. ':flights')) do
  local told = flight_told(prefix, key, now)
  if told then
    table.insert(told, 1, key)
    found[#found + 1] = told
  end
end
return found
