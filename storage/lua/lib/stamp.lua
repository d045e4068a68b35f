-- Return microseconds since the Unix epoch by this server's clock, as digits: a Lua number that large would be
-- rounded where it is written. For what is ordered by time; what expires goes by now_ms().
local function now_us()
  local time = redis.call('TIME')
  return time[1] .. string.format('%06d', tonumber(time[2]))
end
