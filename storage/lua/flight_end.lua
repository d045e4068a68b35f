-- End a flight without a blob: it failed, or its owner gives it up. The recorded upload stays for the next.
--
-- KEYS[1]    prefix of the farm's keys
-- ARGV[1]    key
-- ARGV[2…4]  epoch, fence, token
-- ARGV[5]    the event, payload
-- ARGV[6]    '1' if those who wait go on waiting, for the next owner
-- ARGV[7]    limits of the audit stream (lib/audit.lua); '' to note nothing
-- ARGV[8]    entry for it, payload
-- return     1, or 0 if it owns no more: then nothing has changed
-- include: time
-- include: flight
-- include: audit
local prefix, key, now = KEYS[1], ARGV[1], now_ms()
if not flight_is_owner(prefix, key, ARGV[2], ARGV[3], ARGV[4], now) then
  return 0
end
redis.call('DEL', flight_key(prefix, key))
if ARGV[6] ~= '1' then
  redis.call('DEL', waiters_key(prefix, key))
end
flight_settle(prefix, key, ARGV[3], ARGV[5])
audit_note(prefix, ARGV[7], {ARGV[8]}, now)
return 1
