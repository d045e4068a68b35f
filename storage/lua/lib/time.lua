-- Return milliseconds since the Unix epoch by this server's clock: the only clock that counts.
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
